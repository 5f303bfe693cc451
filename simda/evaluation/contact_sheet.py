"""One picture of many videos: a row per video, its frames from left to right, its prompt and marks above them.

Here lives the drawing only. The cards are those of `report.py`, which shows the same as a page of playing videos.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from simda.data.uris import write_bytes
from simda.evaluation.report import ReportCard, ReportVideo

MARGIN_PX = 12
CAPTION_PX = 24
GAP_PX = 2
MIN_WIDTH_PX = 560

PAGE, INK, SOFT = "#17181c", "#eceef2", "#9b9fa9"
RIGHT, WRONG = "#6fd8a0", "#ff8e84"
MARK_WIDTH_PX = 10


def write_contact_sheet(
    uri: str, cards: Sequence[ReportCard], frames_by_path: Mapping[str, NDArray[np.uint8]], scale: int = 2
) -> None:
    """Write the contact sheet as a PNG.

    Args:
        uri: of the picture; local or S3.
        cards: the prompts with their videos, one row of the sheet per video.
        frames_by_path: `ReportVideo.path` -> uint8 RGB [frames, height, width, 3]; a video that is absent here gets
            a row without frames that says so.
        scale: whole factor of enlargement, by repeated pixels.
    """
    picture = io.BytesIO()
    draw_contact_sheet(cards, frames_by_path, scale).save(picture, format="PNG")
    write_bytes(uri, picture.getbuffer())


def draw_contact_sheet(
    cards: Sequence[ReportCard], frames_by_path: Mapping[str, NDArray[np.uint8]], scale: int = 2
) -> Image.Image:
    """The contact sheet as an image; arguments as for `write_contact_sheet`."""
    rows = [
        (card, video, _film_strip(frames_by_path[video.path], scale) if video.path in frames_by_path else None)
        for card in cards
        for video in card.videos
    ]
    widths = [strip.width for _, _, strip in rows if strip]
    heights = [CAPTION_PX + (strip.height if strip else 0) + MARGIN_PX for _, _, strip in rows]
    size = (max([MIN_WIDTH_PX, *widths]) + 2 * MARGIN_PX, sum(heights) + MARGIN_PX)
    sheet = Image.new("RGB", size, PAGE)
    top = MARGIN_PX
    for (card, video, strip), height in zip(rows, heights, strict=True):
        _draw_caption(sheet, top, card, video, is_missing=strip is None)
        if strip:
            sheet.paste(strip, (MARGIN_PX, top + CAPTION_PX))
        top += height
    return sheet


def _film_strip(frames: NDArray[np.uint8], scale: int) -> Image.Image:
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = large.shape[1:3]
    strip = Image.new("RGB", (len(large) * (width + GAP_PX) - GAP_PX, height), PAGE)
    for number, frame in enumerate(large):
        strip.paste(Image.fromarray(frame), (number * (width + GAP_PX), 0))
    return strip


def _draw_caption(sheet: Image.Image, top_px: int, card: ReportCard, video: ReportVideo, is_missing: bool) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    words = [(card.prompt, INK)]
    words += [("held out", SOFT)] if card.is_held_out else []
    words += [(text, SOFT) for text in (video.label, video.note, "no frames" if is_missing else "") if text]
    left = float(MARGIN_PX)
    for name, right in video.marks.items():
        if right is not None:
            _draw_mark(draw, left, top_px + 4, right)
            left += MARK_WIDTH_PX + 4
            draw.text((left, top_px), name, fill=RIGHT if right else WRONG, font=font)
            left += draw.textlength(name, font=font) + MARGIN_PX
    for text, colour in words:
        line = " ".join(text.split())
        draw.text((left, top_px), line, fill=colour, font=font)
        left += draw.textlength(line, font=font) + MARGIN_PX


def _draw_mark(draw: ImageDraw.ImageDraw, left_px: float, top_px: float, right: bool) -> None:
    """A tick or a cross, drawn: the default font has neither."""
    size = MARK_WIDTH_PX - 2
    lines = [[(0.0, 0.55), (0.35, 0.95), (1.0, 0.1)]] if right else [[(0.1, 0.1), (0.9, 0.9)], [(0.1, 0.9), (0.9, 0.1)]]
    for line in lines:
        points = [(left_px + x * size, top_px + y * size) for x, y in line]
        draw.line(points, fill=RIGHT if right else WRONG, width=2)
