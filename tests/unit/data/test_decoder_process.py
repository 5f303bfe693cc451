"""Real processes and real hangs: what a decoder does to its process must not reach this one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from simda.data.decoder_process import DecoderProcess
from simda.data.video_io import probe, read_frames
from simda.errors import VideoError

from .conftest import MakeVideo, hanging_video


@pytest.fixture
def reader() -> Iterator[DecoderProcess]:
    process = DecoderProcess(timeout_s=30)
    yield process
    process.close()


def process_id(uri: str) -> int:
    return os.getpid()


def wait_for_ever(uri: str) -> None:
    # Of the C library: no Python signal handler and no other thread gets a turn.
    ctypes.PyDLL(None).pause()


def crash(uri: str) -> None:
    ctypes.string_at(0)


def leave(uri: str) -> None:
    os._exit(7)


def misspell(uri: str) -> None:
    uri.strpi()  # type: ignore[attr-defined]


def test_videos_are_read_as_in_this_process_by_one_other(reader: DecoderProcess, make_video: MakeVideo) -> None:
    video = make_video("a.mp4")
    assert reader.call(probe, video) == probe(video)
    frames, decoder = reader.call(read_frames, video, [0.0, 0.5], height_px=32, width_px=48)
    expected, same_decoder = read_frames(video, [0.0, 0.5], 32, 48)
    np.testing.assert_array_equal(frames, expected)
    assert (decoder, frames.flags.writeable) == (same_decoder, True)
    assert reader.call(process_id, "") == reader.call(process_id, "") != os.getpid()


def leave_a_copy(uri: str) -> str:
    folder = tempfile.mkdtemp(prefix="simda-")
    (Path(folder) / "copy.mp4").write_bytes(b"x")
    return folder


def test_what_a_killed_decoder_had_copied_is_removed() -> None:
    reader = DecoderProcess(timeout_s=30)
    copied = Path(reader.call(leave_a_copy, ""))
    assert copied.exists()
    with pytest.raises(VideoError, match="crash"):
        reader.call(leave, "")
    assert not copied.parent.exists()
    reader.close()


def test_a_video_that_hangs_its_decoder_is_given_up(tmp_path: Path, make_video: MakeVideo) -> None:
    reader, video, whole = DecoderProcess(timeout_s=2), hanging_video(tmp_path), make_video("a.mp4")
    before = reader.call(process_id, "")
    with pytest.raises(VideoError, match=r"hang\.mp4 was not read within 2 s"):
        reader.call(probe, video)
    assert not psutil.pid_exists(before)
    reader.timeout_s = 30
    assert reader.call(probe, whole).num_frames == 16
    reader.close()


def test_a_call_that_never_gives_the_interpreter_back_is_ended_too() -> None:
    reader = DecoderProcess(timeout_s=0.5)
    before = reader.call(process_id, "")
    with pytest.raises(VideoError, match=r"not read within 0\.5 s"):
        reader.call(wait_for_ever, "/a.mp4")
    assert not psutil.pid_exists(before)
    reader.close()


@pytest.mark.parametrize(("function", "reason"), [(crash, "SIGSEGV"), (leave, "exit code 7")])
def test_a_crash_costs_one_call(reader: DecoderProcess, function, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(VideoError, match=rf"/a\.mp4 made its decoder crash \({reason}\)"):
            reader.call(function, "/a.mp4")
    assert reader.call(process_id, "") > 0


def test_errors_come_over_as_they_are(reader: DecoderProcess) -> None:
    before = reader.call(process_id, "")
    with pytest.raises(VideoError, match=r"/gone\.mp4 does not exist"):
        reader.call(probe, "/gone.mp4")
    with pytest.raises(AttributeError, match="strpi") as caught:
        reader.call(misspell, "x")
    assert "in misspell" in caught.value.__notes__[0]
    assert reader.call(process_id, "") == before


def test_it_ends_with_the_process_that_made_it() -> None:
    code = (
        "from simda.data.decoder_process import DecoderProcess; import os, sys;"
        "reader = DecoderProcess(30); print(reader._child.pid, flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = psutil.Process(int(owner.stdout.readline()))
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert not psutil.wait_procs([child], timeout=30)[1]
