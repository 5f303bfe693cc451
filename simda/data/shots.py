"""Where a video cuts from one shot to the next, found by PySceneDetect in all of its frames.

Its detector compares the change from one frame to the next with the changes around it, so that a moving camera is no
cut; slow dissolves and fades are none either. Frames and their times are those that clips are read with.
"""

from __future__ import annotations

from itertools import pairwise

from simda.data.video_decoders import decode_small
from simda.data.video_index import DECODER_ERRORS, VideoIndex

SMALL_PX = 256
"""Width to which frames are scaled down before they are compared, as PySceneDetect does."""

Shot = tuple[float, float]
"""Start and end of a shot, seconds from the video's first frame."""


def find_shots(path: str, index: VideoIndex, threshold: float) -> list[Shot]:
    """The shots of a local video, in order and without gaps.

    What cannot be decoded belongs to the shot before it: whether its clips can be read is seen when they are.

    Args:
        threshold: how many times larger a change must be than the mean of the two changes before and the two after it;
            3 is PySceneDetect's own.
    """
    # Only videos whose shots are asked for need OpenCV.
    from scenedetect import AdaptiveDetector, FrameTimecode

    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=1)
    cuts: set[int] = set()
    try:
        for number, picture in decode_small(path, index, SMALL_PX):
            found = detector.process_frame(FrameTimecode(number, fps=max(index.info.fps, 1.0)), picture)
            cuts.update(cut.frame_num for cut in found)
    except DECODER_ERRORS:
        pass
    inner = sorted(cut for cut in cuts if 0 < cut < len(index.times_s))
    edges_s = [0.0, *index.times_s[inner].tolist(), index.info.duration_s]
    return [(start_s, end_s) for start_s, end_s in pairwise(edges_s) if end_s > start_s]
