"""The report page and the contact sheet: hostile prompts stay text, videos are linked, pictures have their place."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from simda.errors import InputError
from simda.evaluation.contact_sheet import CAPTION_PX, GAP_PX, MARGIN_PX, draw_contact_sheet, write_contact_sheet
from simda.evaluation.report import ReportCard, ReportVideo, render_report, write_report

HOSTILE = "</h2><script>alert('x')</script>\" onload=\"x & <b>"
MARKS = {"shape": True, "colour": True, "motion": False, "background": None}
CARDS = [
    ReportCard(
        "a red star moving left",
        [
            ReportVideo("videos/a b#1.mp4", "SimDA", MARKS, "measured: standing still"),
            ReportVideo("videos/c.mp4", "without adapters", {"shape": True}),
        ],
        is_held_out=True,
    ),
    ReportCard("a blue ring growing", [ReportVideo("videos/d.mp4", marks={"shape": True})]),
]


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_video_is_linked_beside_the_page_and_loops():
    videos = Page(render_report("Run", {}, CARDS)).all("video")
    assert [video["src"] for video in videos] == ["videos/a%20b%231.mp4", "videos/c.mp4", "videos/d.mp4"]
    for video in videos:
        assert {"loop", "muted", "autoplay", "playsinline"} <= video.keys()


def test_nothing_comes_from_elsewhere():
    html = render_report("Run", {}, CARDS)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"https?:|url\(|@import", html)


def test_hostile_texts_stay_texts():
    card = ReportCard(HOSTILE, [ReportVideo("videos/a.mp4", HOSTILE, {HOSTILE: True}, HOSTILE)])
    page = Page(render_report(HOSTILE, {HOSTILE: {HOSTILE: HOSTILE}}, [card]))
    assert not page.all("script")
    assert not page.all("b")
    assert all("onload" not in attributes for _, attributes in page.tags)
    assert page.text.count(HOSTILE) == 9  # title twice, table three times, prompt, label, mark, note


@pytest.mark.parametrize("path", ["", "/root/a.mp4", "s3://bucket/a.mp4", "https://example.org/a.mp4"])
def test_videos_that_are_not_beside_the_page_are_refused(path):
    with pytest.raises(InputError, match="not a path relative to the page"):
        render_report("Run", {}, [ReportCard("a red star", [ReportVideo(path)])])


def test_a_path_is_never_read_as_a_scheme():
    html = render_report("Run", {}, [ReportCard("a red star", [ReportVideo("javascript:alert(1)")])])
    assert 'src="javascript%3Aalert%281%29"' in html


def test_cards_show_marks_labels_and_the_held_out_badge():
    html = render_report("Run", {}, CARDS)
    page = Page(html)
    assert [card["class"] for card in page.all("article")] == ["card is-faulty is-held-out", "card"]
    for text in ("✓ shape", "✓ colour", "✗ motion", "SimDA", "without adapters", "measured: standing still"):
        assert text in page.text
    assert "background" not in page.text[page.text.index("a red star") :]  # not judged: no mark
    assert page.text.count("held out") == 1


def test_the_summary_has_a_row_per_figure_and_a_column_per_label():
    summary = {"motion right": {"SimDA": 0.971234, "own": 1}, "FVD": {"own": 1234.5}}
    html = render_report("Run", summary, [])
    assert "<tr><th></th><th>SimDA</th><th>own</th></tr>" in html
    assert "<tr><th>motion right</th><td>0.9712</td><td>1</td></tr>" in html
    assert "<tr><th>FVD</th><td>–</td><td>1234</td></tr>" in html


def test_the_page_is_written_whole_and_in_utf8(tmp_path):
    path = tmp_path / "run" / "report.html"
    write_report(str(path), "Läufe", {"prompts": {"SimDA": 2}}, CARDS)
    assert path.read_text(encoding="utf-8") == render_report("Läufe", {"prompts": {"SimDA": 2}}, CARDS)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_contact_sheet_has_a_row_per_video_and_its_frames_in_order(tmp_path):
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    frames[:] = np.arange(5)[:, None, None, None] * 50
    path = tmp_path / "sheet.png"
    write_contact_sheet(str(path), CARDS, {video.path: frames for card in CARDS for video in card.videos})
    sheet = Image.open(path)
    strip_width = 5 * 128 + 4 * GAP_PX
    assert sheet.size == (strip_width + 2 * MARGIN_PX, 3 * (CAPTION_PX + 128 + MARGIN_PX) + MARGIN_PX)
    for row in range(3):
        y = MARGIN_PX + row * (CAPTION_PX + 128 + MARGIN_PX) + CAPTION_PX + 64
        shown = [sheet.getpixel((MARGIN_PX + t * (128 + GAP_PX) + 64, y)) for t in range(5)]
        assert shown == [(t * 50,) * 3 for t in range(5)]


def test_a_sheet_takes_missing_videos_long_prompts_and_any_letters():
    card = ReportCard("звезда " * 200 + "\n★", [ReportVideo("videos/missing.mp4", marks=MARKS)])
    sheet = draw_contact_sheet([card], {})
    assert sheet.size[1] == CAPTION_PX + 2 * MARGIN_PX
    assert draw_contact_sheet([], {}).size[0] > 0
