"""The gallery of a run: it holds every row, is ended by none, and works in a browser from a disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from threading import Timer
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from simda.data.video_io import write_video
from simda.errors import InputError
from simda.evaluation.gallery import COLUMNS, PAGE_ROWS, SORTED_BY, render_gallery, write_gallery

HOSTILE = "</script><script>document.title='owned'</script><!-- \u2028 \x01 \"'& 猫 👩‍👩‍👧"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def row_of(number: int, **changes: Any) -> dict[str, Any]:
    numbers = {"num_inference_steps": 20, "guidance_scale": 7.5, "noise_correlation": 0.0, "num_frames": 4, "fps": 8.0}
    texts = {"negative_prompt": "", "scheduler": "DDIMScheduler", "settings": '{"eta": 0.0}'}
    own = {"prompt_id": f"row-{number}", "prompt": f"a cat, number {number}", "seed": 1000 - number}
    files = {"video_uri": f"videos/row-{number}.mp4", "width_px": 32, "height_px": 32, "seconds": number / 10}
    return own | numbers | texts | files | changes


def data_of(html: str) -> dict[str, Any]:
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 2
    return json.loads(scripts[0])


def test_every_row_is_there_and_none_ends_the_page() -> None:
    html = render_gallery(HOSTILE, [row_of(1), row_of(2, prompt=HOSTILE, video_uri="videos/a b#1:2.mp4")])
    data = data_of(html)
    rows = [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]
    assert [row["prompt"] for row in rows] == ["a cat, number 1", HOSTILE]
    assert [row["video"] for row in rows] == ["videos/row-1.mp4", "videos/a%20b%231%3A2.mp4"]
    assert {name: rows[0][name] for name in COLUMNS[:-1]} == {name: row_of(1)[name] for name in COLUMNS[:-1]}
    assert not re.search(r"(src|href)=|https?://|@import|url\(", html)
    assert set(SORTED_BY) < set(COLUMNS)


@pytest.mark.parametrize("uri", ["", "/videos/a.mp4", "s3://bucket/a.mp4"])
def test_videos_elsewhere_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match="not a path relative to the page"):
        render_gallery("Run", [row_of(1, video_uri=uri)])


ACTIONS = """
<script>
const wait = (what) => new Promise((done, fail) => {
  const start = performance.now();
  const look = () => what() ? done() : performance.now() - start > 8000 ? fail(what) : setTimeout(look, 20);
  look();
});
const set = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input"));
};
const shown = () => [...document.querySelectorAll(".card h2")].map((title) => title.textContent);
(async () => {
  const seen = { all: shown().length, first: shown()[0], title: document.title };
  document.getElementById("more").click();
  seen.more = shown().length;
  set("search", "CAT row-59");
  seen.found = shown();
  set("search", ""); set("sort", "seed");
  seen.by_seed = shown()[0];
  set("order", "down"); set("sort", "prompt_id");
  seen.by_id = shown()[0];
  set("search", "row-0 1000");
  seen.hostile = shown();
  const video = document.querySelector("video");
  await wait(() => video.currentTime > 0.1);
  seen.played = [video.videoWidth, video.videoHeight, video.error];
  console.log("SEEN:" + encodeURIComponent(JSON.stringify(seen)) + ":");
})().catch((fault) => console.log("SEEN:" + encodeURIComponent(JSON.stringify(String(fault))) + ":"));
</script>
"""


@pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
def test_searched_sorted_and_played_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "run #1").mkdir()
    rows = [row_of(0, prompt=HOSTILE), *(row_of(number) for number in range(1, 60))]
    frames = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    write_video(frames, str(tmp_path / "run #1/videos/row-0.mp4"), 8)
    page = tmp_path / "run #1/gallery.html"
    write_gallery(str(page), "Run", rows)
    page.write_text(page.read_text() + ACTIONS)
    assert told_by_browser(page, tmp_path / "profile") == {
        "all": PAGE_ROWS,
        "first": HOSTILE,
        "title": "Run",
        "more": 60,
        "found": ["a cat, number 59"],
        "by_seed": "a cat, number 59",
        "by_id": "a cat, number 59",
        "hostile": [HOSTILE],
        "played": [32, 32, None],
    }


def told_by_browser(page: Path, profile: Path) -> Any:
    """What the page's script tells on the console."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--enable-logging=stderr", "--autoplay-policy=no-user-gesture-required", page.as_uri()]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    give_up = Timer(60, browser.kill)
    give_up.start()
    try:
        assert browser.stderr is not None
        lines = []
        for line in browser.stderr:
            lines.append(line)
            if found := re.search(r"SEEN:([^:]*):", line):
                return json.loads(unquote(found[1]))
        raise AssertionError("".join(lines)[-2000:])
    finally:
        give_up.cancel()
        browser.terminate()
        browser.wait(timeout=20)
