"""An adapter's card, and its way to a model hub and back: through huggingface_hub's own client to a hub on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml

from simda.errors import ConfigError, InputError
from simda.models.adapter_card import CARD_FILE, model_card
from simda.models.adapter_hub import check_push, push_adapter
from simda.models.adapter_state import (
    ADAPTER_FILE,
    adapter_identity,
    count_adapter_parameters,
    read_adapter_header,
    save_adapter,
)
from simda.models.video_unet import AdapterConfig

COMMIT = "0" * 40
PROVENANCE = {"config": {"base_model": "/models/mine", "num_steps": 3}, "data": {"num_clips": 7}}


class Hub(ThreadingHTTPServer):
    """As much of a model hub as a push and a download of small files need."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, object]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/me/mine"})
        elif self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/me/mine/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        data = self.server.files.get(self.path.rpartition("/")[2])
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    save_adapter(weights, AdapterConfig(temporal_kernel=5), "the base", PROVENANCE, str(tmp_path / "adapter"))
    (tmp_path / "adapter" / CARD_FILE).write_text("the card")
    return str(tmp_path / "adapter")


def test_what_is_pushed_can_be_used_by_its_name(hub: Hub, adapter: str) -> None:
    check_push("me/mine")
    assert COMMIT in push_adapter(adapter, (ADAPTER_FILE, CARD_FILE), "me/mine")
    assert hub.created[0]["visibility"] == "private"
    assert hub.files[CARD_FILE] == b"the card"
    assert adapter_identity("me/mine") == adapter_identity(adapter)


def test_a_name_that_is_nowhere_is_told(hub: Hub) -> None:
    with pytest.raises(InputError, match="adapter=me/absent: there is no such directory, and the hub does not have"):
        read_adapter_header("me/absent")


@pytest.mark.parametrize(
    ("repo_id", "token", "offline", "message"),
    [
        ("mine", "x", False, "has no owner"),
        ("me/mi ne", "x", False, "push_to_hub='me/mi ne'"),
        ("me/mine", "x", True, "HF_HUB_OFFLINE is set"),
        ("me/mine", "", False, "nobody is logged in"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_the_run(
    repo_id: str, token: str, offline: bool, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=message):
        check_push(repo_id)


def test_the_card_tells_what_a_stranger_needs(adapter: str) -> None:
    header = read_adapter_header(adapter)
    card = model_card(header, count_adapter_parameters(adapter), {"loss": 0.25, "validation_loss": None}, "apache-2.0")
    _, front, text = card.split("---\n", 2)
    meta = yaml.safe_load(front)
    assert meta["pipeline_tag"] == "text-to-video"
    assert meta["license"] == "apache-2.0"
    assert "base_model" not in meta, "a path on somebody's machine is no name of a model"
    assert "Adapters of 10 parameters" in text
    assert "| temporal_kernel | 5 (not the paper's) |" in text
    assert "| num_clips | 7 |" in text
    assert "| loss | 0.25 |" in text
    assert "validation_loss" not in text
