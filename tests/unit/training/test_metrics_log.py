"""Curves never hold a step twice, and their lines are shown once."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from simda.data.store import OutputStore
from simda.training import metrics_log
from simda.training.metrics_log import MetricsLog, read_metrics, shown_progress


def row(step: int) -> dict:
    return {"step": step, "loss": 0.5, "clips_per_s": 9.84, "seconds_left": 48.2}


def test_lines_after_the_checkpoint_are_taken_back_when_a_run_goes_on(tmp_path: Path):
    store = OutputStore(str(tmp_path))
    assert read_metrics(store) == []
    first = MetricsLog(store, num_steps_done=0)
    for step in (1, 2, 3):
        first.append(row(step))
    first.write()
    second = MetricsLog(store, num_steps_done=2)
    second.append(row(3))
    second.append(row(4))
    second.write()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_lines_are_not_written_more_often_than_every_few_seconds(tmp_path: Path):
    log = MetricsLog(OutputStore(str(tmp_path)), num_steps_done=0)
    for step in (1, 2, 3):
        log.append(row(step))
    assert [line["step"] for line in read_metrics(OutputStore(str(tmp_path)))] == [1]


def test_the_driver_shows_new_lines_only(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(metrics_log, "POLL_EVERY_S", 0.02)
    store = OutputStore(str(tmp_path))
    log = MetricsLog(store, num_steps_done=0)
    log.append(row(10))
    with shown_progress(store, num_steps=600):
        time.sleep(0.1)
        log.append(row(120))
        log.write()
    shown = capsys.readouterr().err.splitlines()
    assert shown == ["step 120/600  loss 0.5000  9.8 clips/s  48 s left"]


def test_neither_a_storage_fault_nor_a_taker_s_ends_what_is_shown(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(metrics_log, "POLL_EVERY_S", 0.02)
    store, taken = OutputStore(str(tmp_path)), []

    def fail(row: dict) -> None:
        raise OSError("gone")

    def told(what: str) -> None:
        deadline = time.monotonic() + 60
        while what not in "".join(shown):
            shown.append(capsys.readouterr().err)
            assert time.monotonic() < deadline, shown

    shown: list[str] = []
    with shown_progress(store, 600, fail, taken.append):
        (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe")
        told("no progress to show: ")
        log = MetricsLog(OutputStore(str(tmp_path / "other")), num_steps_done=0)
        log.append(row(120))
        os.replace(tmp_path / "other" / "metrics.jsonl", tmp_path / "metrics.jsonl")
        told("step 120/600")
        told("the curves go on without")
        log.append(row(130))
        log.write()
        os.replace(tmp_path / "other" / "metrics.jsonl", tmp_path / "metrics.jsonl")
        told("step 130/600")
    assert [line["step"] for line in taken] == [120, 130]
    assert "".join(shown).count("the curves go on without") == 1
