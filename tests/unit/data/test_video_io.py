from __future__ import annotations

import contextlib
import csv
import json
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from simda.data.frame_size import Crop, fit_frame, orient_frame
from simda.data.video_decoders import decode_with_decord, decode_with_pyav, frame_numbers, suits_decord
from simda.data.video_index import index_video
from simda.data.video_io import (
    H264,
    probe,
    read_all_frames,
    read_frames,
    read_video_metadata,
    write_lossless,
    write_video,
)
from simda.errors import StorageError, VideoError

from .conftest import MakeVideo, counting_frames, read_numbers

REAL_VIDEOS = Path("../shared/data/videos")


def smooth_frames(num_frames: int, height_px: int, width_px: int) -> np.ndarray:
    """Soft colours that move, as natural video does."""
    y, x, t = np.meshgrid(np.arange(height_px), np.arange(width_px), np.arange(num_frames), indexing="ij")
    waves = [np.sin(x / 9 + t / 3), np.cos(y / 7 - t / 4), np.sin((x + y) / 11)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8).transpose(2, 0, 1, 3)


def test_probe_tells_what_the_file_holds(make_video: MakeVideo) -> None:
    info = probe(make_video("a.mp4", num_frames=16, fps=8))
    assert (info.num_frames, info.fps, info.duration_s) == (16, 8.0, 2.0)
    assert (info.height_px, info.width_px) == (48, 64)
    assert (info.codec, info.pixel_format, info.rotation_deg, info.constant_rate) == ("h264", "yuv420p", 0, True)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "decoder"),
    [
        ("a.mp4", "libx264", "yuv420p", "decord"),
        ("a.mkv", "libx264", "yuv420p", "decord"),
        ("a.webm", "libvpx-vp9", "yuv420p", "decord"),
        ("a.mp4", "libx264", "yuv420p10le", "pyav"),
        ("a.mp4", "libx265", "yuv420p", "pyav"),
        ("a.mkv", "libsvtav1", "yuv420p", "pyav"),
        ("a.avi", "mpeg4", "yuv420p", "pyav"),
        ("a.mpg", "mpeg2video", "yuv420p", "pyav"),
        ("a.gif", "gif", "rgb8", "pyav"),
    ],
)
def test_every_codec_gives_the_frames_that_were_asked_for(
    make_video: MakeVideo, name: str, codec: str, pixel_format: str, decoder: str
) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    fps = 25 if codec == "mpeg2video" else 10
    frames = counting_frames(24, 64, 64)
    video = make_video(name, fps=fps, codec=codec, pixel_format=pixel_format, frames=frames, options=options)
    numbers = [17, 3, 3, 23, 0, 8]
    found, used = read_frames(video, [number / fps for number in numbers], 64, 64)
    assert found.shape == (6, 64, 64, 3)
    assert found.dtype == np.uint8
    assert read_numbers(found) == numbers
    assert used == decoder


def test_a_frame_is_on_the_screen_until_the_next_one_begins(make_video: MakeVideo) -> None:
    video = make_video("a.mp4", num_frames=8, fps=10)
    frames, _ = read_frames(video, [0.0, 0.098, 0.1, 0.25, 0.799], 48, 64)
    assert read_numbers(frames) == [0, 0, 1, 2, 7]


def test_rounded_clocks_do_not_repeat_frames(make_video: MakeVideo) -> None:
    # Matroska stores 1/30 s as 33 ms and 2/30 s as 67 ms, a hair later than it is asked for.
    video = make_video("a.mkv", num_frames=20, fps=30)
    frames, _ = read_frames(video, (np.arange(20) / 30).tolist(), 48, 64)
    assert read_numbers(frames) == list(range(20))


def test_variable_frame_rate_goes_by_the_clock(make_video: MakeVideo) -> None:
    video = make_video("a.mkv", fps=10, frames=counting_frames(5), times=[0, 1, 6, 7, 20])
    info = probe(video)
    assert not info.constant_rate
    assert info.fps == pytest.approx(2.0)
    frames, decoder = read_frames(video, [0.0, 0.15, 0.55, 0.65, 1.5, 2.0], 48, 64)
    assert read_numbers(frames) == [0, 1, 1, 2, 3, 4]
    assert decoder == "pyav"


def test_an_edit_list_hides_frames(make_video: MakeVideo, tmp_path: Path) -> None:
    original = make_video("a.mp4", num_frames=24, fps=8, options={"g": "12", "bf": "2"})
    cut = str(tmp_path / "cut.mp4")
    with av.open(original) as source, av.open(cut, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                # Six of the frames come to lie before time zero, where players do not show them.
                packet.pts -= round(6 / 8 / packet.time_base)
                packet.dts -= round(6 / 8 / packet.time_base)
                packet.stream = stream
                target.mux(packet)
    assert probe(cut).num_frames == 18
    frames, _ = read_frames(cut, [0.0, 1.0, 2.0], 48, 64)
    assert read_numbers(frames) == [6, 14, 22]


@pytest.mark.parametrize("rotation_deg", [0, 90, 180, 270])
def test_rotation_is_undone_alike_by_both_decoders(make_video: MakeVideo, rotation_deg: int) -> None:
    frames = counting_frames(6, 32, 64)
    video = make_video("a.mp4", frames=frames, rotation_deg=rotation_deg)
    info = probe(video)
    assert (info.height_px, info.width_px) == ((64, 32) if rotation_deg % 180 else (32, 64))
    assert info.rotation_deg == rotation_deg
    index = index_video(video)
    by_decord, by_pyav = decode_with_decord(video, index, [1, 4]), dict(decode_with_pyav(video, index, [1, 4]))
    assert by_decord is not None
    for number in (1, 4):
        np.testing.assert_array_equal(by_decord[number], by_pyav[number])
        assert np.abs(by_pyav[number].astype(int) - np.rot90(frames[number], rotation_deg // 90)).mean() < 4


def test_a_mirrored_display_matrix_is_honoured(make_video: MakeVideo) -> None:
    frames = counting_frames(4, 32, 64)
    for rotation_deg in (0, 90):
        video = make_video(f"{rotation_deg}.mp4", frames=frames, rotation_deg=rotation_deg, hflip=True)
        shown, decoder = read_frames(video, [0.0])
        upright = np.rot90(frames[0], rotation_deg // 90)[:, ::-1]
        assert decoder == "pyav"
        assert shown.shape[1:] == upright.shape
        assert np.abs(shown[0].astype(int) - upright).mean() < 4


def test_wide_pixels_are_made_square(make_video: MakeVideo) -> None:
    video = make_video("a.mp4", frames=counting_frames(4, 48, 64), pixel_aspect=Fraction(3, 2))
    assert (probe(video).height_px, probe(video).width_px) == (48, 96)
    assert read_frames(video, [0.0])[0].shape == (1, 48, 96, 3)


@pytest.mark.parametrize(
    ("codec", "options", "decord_may"),
    [
        ("libx264", {"g": "250", "bf": "3"}, True),
        ("libx264", {"g": "6", "bf": "3"}, True),
        ("libx264", {"x264-params": "open-gop=1:keyint=6:min-keyint=6:scenecut=0:bframes=3:b-pyramid=2"}, False),
        ("libx265", {"x265-params": "open-gop=1:keyint=6:min-keyint=6:bframes=3:log-level=none"}, False),
        ("mpeg2video", {"g": "6", "bf": "2"}, False),
    ],
)
def test_jumps_change_nothing(make_video: MakeVideo, codec: str, options: dict[str, str], decord_may: bool) -> None:
    video = make_video("a.mp4", frames=smooth_frames(40, 48, 64), fps=25, codec=codec, options=options)
    index = index_video(video)
    assert suits_decord(index) == decord_may
    whole = dict(decode_with_pyav(video, index, range(40)))
    rng = np.random.default_rng(0)
    for _ in range(8):
        numbers = rng.choice(40, size=4, replace=False).tolist()
        by_pyav = dict(decode_with_pyav(video, index, numbers))
        by_decord = decode_with_decord(video, index, numbers) if decord_may else by_pyav
        assert by_decord is not None
        for number in numbers:
            np.testing.assert_array_equal(by_decord[number], whole[number])
            np.testing.assert_array_equal(by_pyav[number], whole[number])


def test_crop_keeps_the_aspect_and_the_centre() -> None:
    frame = np.zeros((40, 100, 3), dtype=np.uint8)
    frame[:, 30:70] = 255
    fitted = fit_frame(frame, 20, 20)
    assert fitted.shape == (20, 20, 3)
    assert fitted[:, 2:-2].min() == 255
    assert fitted.min() > 200
    np.testing.assert_array_equal(fit_frame(frame, 40, 100), frame)


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(fit_frame(stripes, 16, 16)[4:12, 4:12].astype(int)) < 10


def test_orient_frame_flips_before_it_turns() -> None:
    frame = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    assert orient_frame(frame, 90, True)[..., 0].tolist() == [[5, 2], [4, 1], [3, 0]]


def test_times_outside_of_the_video_are_refused(make_video: MakeVideo) -> None:
    video = make_video("a.mp4", num_frames=8, fps=8)
    for time_s in (-0.5, 1.5, float("nan")):
        with pytest.raises(VideoError, match=r"no frame at .*lasts from 0 to 1\.000 s"):
            read_frames(video, [time_s], 48, 64)


def sound_only(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.mp4", None, "does not exist"),
        ("empty.mp4", b"", "is empty"),
        ("text.mp4", b"not a video " * 100, "cannot be decoded"),
        ("page.mp4", b"<!DOCTYPE html><html><body>404</body></html>", "cannot be decoded"),
        ("random.mp4", np.random.default_rng(0).bytes(5000), "cannot be decoded"),
        ("sound.mp4", "sound", "has no video stream"),
        ("folder.mp4", "folder", "cannot be decoded"),
    ],
)
def test_what_is_no_video_is_told_with_path_and_reason(tmp_path: Path, name: str, content: object, reason: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "sound":
        sound_only(path)
    elif content == "folder":
        path.mkdir()
    for attempt in (lambda: probe(str(path)), lambda: read_frames(str(path), [0.0], 8, 8)):
        with pytest.raises(VideoError, match=reason) as fault:
            attempt()
        assert str(path) in str(fault.value)


def test_a_truncated_video_gives_what_it_has(make_video: MakeVideo, tmp_path: Path) -> None:
    whole = Path(make_video("a.mkv", frames=smooth_frames(60, 64, 64), fps=10))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    info = probe(str(cut))
    assert 1 <= info.num_frames < 60
    assert read_frames(str(cut), [0.0], 64, 64)[0].shape == (1, 64, 64, 3)
    with pytest.raises(VideoError, match=r"no frame at 5\.000 s"):
        read_frames(str(cut), [0.0, 5.0], 64, 64)


def test_damaged_files_end_in_frames_or_a_video_error(make_video: MakeVideo, tmp_path: Path) -> None:
    whole = Path(make_video("a.mp4", frames=smooth_frames(24, 64, 64), options={"movflags": "+faststart"})).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for number in range(30):
        damaged = bytearray(whole[: int(rng.integers(100, len(whole)))] if number % 3 == 0 else whole)
        for place in rng.integers(0, len(damaged), size=int(rng.integers(1, 40))):
            damaged[place] = int(rng.integers(256))
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(damaged)
        try:
            frames, _ = read_frames(str(path), [0.0, 1.0, 2.0], 32, 32)
            assert frames.shape == (3, 32, 32, 3)
            outcomes.add("frames")
        except VideoError:
            outcomes.add("error")
    assert outcomes == {"frames", "error"}


def test_write_then_read(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "a.mp4")
    frames = smooth_frames(12, 64, 96)
    write_video(frames, path, 8, {"prompt": 'ein Bär, 熊 "quoted"\nsecond line', "seed": 7, "settings": {"steps": 20}})
    info = probe(path)
    assert (info.num_frames, info.fps, info.height_px, info.width_px) == (12, 8.0, 64, 96)
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    again, _ = read_frames(path, (np.arange(12) / 8).tolist())
    error = (again.astype(float) - frames) ** 2
    # Colour is stored at half the resolution, which costs these saturated waves more than natural video.
    assert 10 * np.log10(255**2 / error.mean()) > 34
    assert 10 * np.log10(255**2 / ((again.mean(-1) - frames.mean(-1)) ** 2).mean()) > 40
    metadata = read_video_metadata(path)
    assert metadata["prompt"] == 'ein Bär, 熊 "quoted"\nsecond line'
    assert (metadata["seed"], metadata["settings"]) == ("7", '{"steps": 20}')
    data = Path(path).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert [entry.name for entry in Path(path).parent.iterdir()] == ["a.mp4"]


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = smooth_frames(12, 64, 64)
    for name in ("a.mp4", "b.mp4"):
        write_video(frames, str(tmp_path / name), 8, {"comment": "x"})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(("height_px", "width_px"), [(33, 48), (32, 47), (1, 1), (31, 63)])
def test_odd_sizes_come_back_as_they_were(tmp_path: Path, height_px: int, width_px: int) -> None:
    path = str(tmp_path / "a.mp4")
    frames = smooth_frames(4, height_px, width_px)
    write_video(frames, path, 8)
    with av.open(path) as container:
        coded = container.streams.video[0]
        assert (coded.height % 2, coded.width % 2) == (0, 0)
    info = probe(path)
    assert (info.height_px, info.width_px) == (height_px, width_px)
    again, _ = read_frames(path, [0.0, 0.125, 0.25, 0.375])
    assert again.shape == frames.shape
    assert np.abs(again.astype(float) - frames).mean() < 6


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VideoError, match=r"uint8 \[frames, height, width, 3\]"):
        write_video(np.zeros((4, 8, 8), dtype=np.uint8), str(tmp_path / "a.mp4"), 8)
    with pytest.raises(VideoError, match="fps=0"):
        write_video(np.zeros((4, 8, 8, 3), dtype=np.uint8), str(tmp_path / "a.mp4"), 0)
    monkeypatch.setitem(H264.options, "crf", "nonsense")
    with pytest.raises(VideoError, match=r"a\.mp4"):
        write_video(np.zeros((4, 8, 8, 3), dtype=np.uint8), str(tmp_path / "a.mp4"), 8)
    assert list(tmp_path.iterdir()) == []


def test_lossless_frames_come_back_as_they_were(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 37, 51, 3), dtype=np.uint8)
    path = str(tmp_path / "a.mkv")
    write_lossless(frames, path, 7.5, {"comment": {"prompt": "猫"}})
    np.testing.assert_array_equal(read_all_frames(path), frames)
    assert probe(path).fps == pytest.approx(7.5)
    assert json.loads({k.lower(): v for k, v in read_video_metadata(path).items()}["comment"]) == {"prompt": "猫"}
    first = Path(path).read_bytes()
    write_lossless(frames, path, 7.5, {"comment": {"prompt": "猫"}})
    assert Path(path).read_bytes() == first


@pytest.mark.parametrize("write", [write_video, write_lossless])
def test_a_disk_without_space_is_no_fault_of_the_video(write, tmp_path: Path) -> None:
    """A file that may not grow stands for a disk that is full: the encoder meets either in the same call."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"a\.mkv cannot be written: File too large"):
            write(noise, str(tmp_path / "a.mkv"), 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_video_on_s3_reads_like_a_local_one(make_video: MakeVideo, s3_bucket: str) -> None:
    from simda.data.uris import write_bytes

    local = make_video("a.mp4", num_frames=8, fps=8)
    remote = f"{s3_bucket}/deep/ä b.mp4"
    write_bytes(remote, Path(local).read_bytes())
    np.testing.assert_array_equal(read_frames(remote, [0.5], 32, 32)[0], read_frames(local, [0.5], 32, 32)[0])
    with pytest.raises(VideoError, match=rf"{s3_bucket}/absent\.mp4 does not exist"):
        probe(f"{s3_bucket}/absent.mp4")


def corpus() -> list[dict[str, str]]:
    index = REAL_VIDEOS / "INDEX.csv"
    if not index.exists():
        return []
    with index.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", corpus() or [None], ids=lambda row: row["file"] if row else "absent")
def test_the_corpus_decodes_or_says_why_not(row: dict[str, str] | None) -> None:
    if row is None:
        pytest.skip(f"no videos in {REAL_VIDEOS}")
    path = str(REAL_VIDEOS / row["file"])
    with contextlib.ExitStack() as stack:
        if row["kind"] == "broken":
            stack.enter_context(contextlib.suppress(VideoError))
        info = probe(path)
        middle_s = info.duration_s / 2
        frames, decoder = read_frames(path, [0.0, middle_s], 32, 32)
    if row["kind"] == "broken":
        return
    assert frames.shape == (2, 32, 32, 3)
    if row["streams"].startswith("v1"):
        assert info.num_frames == int(row["frames_decoded"])
    # What is read at a time is what a plain decode of the whole file shows then, whichever decoder read it.
    index = index_video(path)
    number = frame_numbers(index, [middle_s], path)[0]
    with av.open(path) as container:
        stream = container.streams.best("video")
        plain = next(frame for count, frame in enumerate(container.decode(stream)) if count == number)
        picture = orient_frame(plain.to_ndarray(format="rgb24"), info.rotation_deg, info.flipped)
    aspect = 1 / info.pixel_aspect if info.rotation_deg % 180 else info.pixel_aspect
    np.testing.assert_array_equal(frames[1], fit_frame(picture, 32, 32, aspect))
    assert decoder in ("decord", "pyav")


def test_a_crop_shows_its_part_of_the_picture(make_video: MakeVideo) -> None:
    picture = np.zeros((40, 80, 3), dtype=np.uint8)
    picture[:, :, 0] = np.arange(80) * 3
    picture[:, :, 1] = np.arange(40)[:, None] * 6

    def corners(crop: Crop) -> list[int]:
        fitted = fit_frame(picture, 20, 20, crop=crop).astype(int)
        return [round(value) for value in (fitted[10, 1, 0] / 3, fitted[10, -2, 0] / 3, fitted[1, 10, 1] / 6)]

    left, right, top = corners(Crop())
    assert (left, right, top) == pytest.approx((23, 57, 2), abs=1)
    assert corners(Crop(left=0.0)) == pytest.approx([left - 20, right - 20, top], abs=1)
    assert corners(Crop(left=1.0, mirrored=True)) == pytest.approx([right + 20, left + 20, top], abs=1)
    half = corners(Crop(side=0.5, top=1.0))
    assert half == pytest.approx([31, 48, 21], abs=1)

    video = make_video("a.mp4", num_frames=3)
    straight, _ = read_frames(video, [0.0, 0.25], 48, 64)
    mirrored, _ = read_frames(video, [0.0, 0.25], 48, 64, Crop(mirrored=True))
    np.testing.assert_array_equal(mirrored, straight[:, :, ::-1])


def test_a_frame_may_stand_for_longer_than_half_an_hour(tmp_path: Path) -> None:
    frames = np.full((1, 32, 32, 3), 200, np.uint8)
    write_video(frames, str(tmp_path / "slow.mp4"), 1 / 5000)
    assert probe(str(tmp_path / "slow.mp4")).num_frames == 1
