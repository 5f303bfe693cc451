"""The page that shows an evaluation: summary figures on top, then a card per prompt with its videos and marks.

Here live the cards and their HTML, one self-contained file that opens from a disk or a bucket and links the videos
beside it. Judging and averaging are done before; the same cards as one picture are `contact_sheet.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from simda.data.uris import write_bytes
from simda.evaluation.page import page_head, video_link

Figure = str | int | float

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1d20; --soft: #6a6d75; --line: #e2e2de;
  --right: #157f4b; --right-bg: #e3f4ea; --wrong: #b3261e; --wrong-bg: #fbe7e5; --badge: #6b4bc4; --badge-bg: #ece6fb; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1d1f24; --ink: #e9eaee; --soft: #9b9fa9;
  --line: #31343b; --right: #6fd8a0; --right-bg: #17352a; --wrong: #ff9d94; --wrong-bg: #45211f; --badge: #c6b3ff;
  --badge-bg: #302750; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 110rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 1rem; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
.summary { overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
th, td { padding: .4rem 1rem; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child { text-align: left; font-weight: 500; }
thead th { color: var(--soft); font-weight: 500; }
tbody tr > * { border-top: 1px solid var(--line); }
.filters { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; margin: 1.5rem 0 1rem; color: var(--soft); }
.filters label { cursor: pointer; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--card-width)), 1fr)); }
.card { padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card h2 { margin: 0 0 .8rem; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
.badge, .mark { display: inline-block; padding: 0 .5em; border-radius: 99px; font-size: .75rem; line-height: 1.6;
  font-weight: 500; white-space: nowrap; }
.badge { margin-left: .3em; color: var(--badge); background: var(--badge-bg); }
.videos { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 160px; max-width: 320px; }
video { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; background: #000;
  image-rendering: pixelated; }
figcaption { margin-top: .4rem; font-size: .85rem; }
.label { font-weight: 600; }
.note { color: var(--soft); overflow-wrap: anywhere; }
.marks { display: flex; flex-wrap: wrap; gap: .25rem; margin: .25rem 0; }
.right { color: var(--right); background: var(--right-bg); }
.wrong { color: var(--wrong); background: var(--wrong-bg); }
body:has(#only-faulty:checked) .card:not(.is-faulty), body:has(#only-held-out:checked) .card:not(.is-held-out) {
  display: none; }
"""


@dataclass(frozen=True)
class ReportVideo:
    """One video of a card.

    Attributes:
        path: of the video, relative to the page, with forward slashes.
        label: what made it, as "SimDA" or "without adapters"; may be empty where a card has one video.
        marks: attribute -> right or wrong; None where it was not judged.
        note: one line below, as "measured: standing still".
    """

    path: str
    label: str = ""
    marks: Mapping[str, bool | None] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ReportCard:
    """A prompt and the videos that were made from it, in the order of their columns."""

    prompt: str
    videos: Sequence[ReportVideo]
    is_held_out: bool = False


def write_report(
    uri: str, title: str, summary: Mapping[str, Mapping[str, Figure]], cards: Sequence[ReportCard]
) -> None:
    """Write the page as one HTML file without external resources.

    Args:
        uri: of the page, usually `OUTPUT/report.html`; local or S3.
        summary: the table on top, row name -> column name (a video's label, say) -> figure.

    Raises:
        InputError: a video's path is absolute or a URI: the page would not survive being moved or served.
    """
    write_bytes(uri, render_report(title, summary, cards).encode())


def render_report(title: str, summary: Mapping[str, Mapping[str, Figure]], cards: Sequence[ReportCard]) -> str:
    """The page's HTML; arguments and errors as for `write_report`."""
    most_videos = max((len(card.videos) for card in cards), default=1)
    filters = [
        f'<label><input type="checkbox" id="{name}"> {words} ({number})</label>'
        for name, words, number in (
            ("only-faulty", "only cards with a cross", sum(_is_faulty(card) for card in cards)),
            ("only-held-out", "only held-out prompts", sum(card.is_held_out for card in cards)),
        )
        if number
    ]
    lines = [
        *page_head(title, STYLE),
        _summary_table(summary),
        f'<div class="filters">{"".join(filters)}</div>',
        f'<main class="cards" style="--card-width: {200 * most_videos + 40}px">',
        *map(_card, cards),
        "</main>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _summary_table(summary: Mapping[str, Mapping[str, Figure]]) -> str:
    columns = list(dict.fromkeys(column for figures in summary.values() for column in figures))
    if not columns:
        return ""
    head = "".join(f"<th>{escape(column.replace('_', ' '))}</th>" for column in columns)
    rows = [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{_figure(figures.get(column))}</td>' for column in columns)}</tr>"
        for name, figures in summary.items()
    ]
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="summary">{table}</div>'


def _figure(value: Figure | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _card(card: ReportCard) -> str:
    classes = ["card", *(["is-faulty"] if _is_faulty(card) else []), *(["is-held-out"] if card.is_held_out else [])]
    badge = ' <span class="badge">held out</span>' if card.is_held_out else ""
    videos = "\n".join(map(_video, card.videos))
    return (
        f'<article class="{" ".join(classes)}">\n<h2>{escape(card.prompt)}{badge}</h2>\n'
        f'<div class="videos">\n{videos}\n</div>\n</article>'
    )


def _video(video: ReportVideo) -> str:
    marks = "".join(
        f'<span class="mark {"right" if right else "wrong"}">{"✓" if right else "✗"} {escape(name)}</span>'
        for name, right in video.marks.items()
        if right is not None
    )
    label = f'<span class="label">{escape(video.label)}</span>' if video.label else ""
    note = f'<span class="note">{escape(video.note)}</span>' if video.note else ""
    return (
        f'<figure><video src="{escape(video_link(video.path))}" loop muted autoplay playsinline></video>'
        f'<figcaption>{label}<div class="marks">{marks}</div>{note}</figcaption></figure>'
    )


def _is_faulty(card: ReportCard) -> bool:
    return any(False in video.marks.values() for video in card.videos)
