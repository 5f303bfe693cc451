"""The page that shows a run of `generate`: its videos with prompts and settings, to search and to sort.

Here lives the page, one self-contained file beside the videos that opens from a disk or a bucket. It holds the rows as
JSON and draws as many as fit on a screen; nothing is fetched but the videos. Verdicts on videos are `report.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from simda.data.uris import write_bytes
from simda.evaluation.page import page_head, video_link

COLUMNS = (
    "prompt_id",
    "prompt",
    "negative_prompt",
    "seed",
    "scheduler",
    "num_inference_steps",
    "guidance_scale",
    "noise_correlation",
    "num_frames",
    "width_px",
    "height_px",
    "fps",
    "seconds",
    "settings",
    "video_uri",
)
"""What the page shows of a row of the generated table."""
SORTED_BY = ("prompt_id", "prompt", "seed", "seconds", "num_inference_steps", "guidance_scale", "num_frames")
PAGE_ROWS = 48

STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1d20; --soft: #6a6d75; --line: #e2e2de; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1d1f24; --ink: #e9eaee; --soft: #9b9fa9;
  --line: #31343b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 110rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 1rem; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
form { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin-bottom: 1rem; color: var(--soft); }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .35rem .7rem; }
input { flex: 1 1 16rem; min-width: 0; color: var(--ink); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
.card { padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card h2 { margin: .6rem 0 .3rem; font-size: .95rem; font-weight: 600; overflow-wrap: anywhere; max-height: 9em;
  overflow-y: auto; }
.card p { margin: 0; color: var(--soft); font-size: .8rem; overflow-wrap: anywhere; }
video { display: block; width: 100%; object-fit: contain; border-radius: 6px; background: #000; }
"""

SCRIPT = """
const data = JSON.parse(document.getElementById("rows").textContent);
const rows = data.rows.map((values) => Object.fromEntries(data.columns.map((name, place) => [name, values[place]])));
rows.forEach((row) => { row.text = Object.values(row).join(" ").toLowerCase(); });
const [search, sort, order] = ["search", "sort", "order"].map((id) => document.getElementById(id));
const [cards, count, more] = ["cards", "count", "more"].map((id) => document.getElementById(id));
let found = [];
const player = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  if (isIntersecting) { target.play().catch(() => {}); } else { target.pause(); }
}));
function element(name, text, parent) {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}
function draw(row) {
  const card = element("article", "", cards);
  card.className = "card";
  const video = element("video", "", card);
  Object.assign(video, { src: row.video, muted: true, loop: true, playsInline: true, controls: true });
  video.preload = "metadata";
  video.style.aspectRatio = row.width_px + " / " + row.height_px;
  if (row.width_px < 200) { video.style.imageRendering = "pixelated"; }
  player.observe(video);
  element("h2", row.prompt, card);
  if (row.negative_prompt) { element("p", "not: " + row.negative_prompt, card); }
  element("p", row.prompt_id + " · seed " + row.seed, card);
  element("p", row.num_frames + " frames of " + row.width_px + "×" + row.height_px + " at " + row.fps + "/s · "
    + row.scheduler + ", " + row.num_inference_steps + " steps, guidance " + row.guidance_scale + " · "
    + row.seconds.toFixed(1) + " s", card);
  if (row.settings) { element("p", row.settings, card); }
}
function drawMore() {
  found.slice(cards.childElementCount, cards.childElementCount + data.page).forEach(draw);
  more.hidden = cards.childElementCount >= found.length;
}
function update() {
  const words = search.value.toLowerCase().split(/\\s+/);
  found = rows.filter((row) => words.every((word) => row.text.includes(word)));
  const sign = order.value === "up" ? 1 : -1, name = sort.value;
  found.sort((one, other) => sign * (typeof one[name] === "number" ? one[name] - other[name]
    : one[name].localeCompare(other[name], undefined, { numeric: true })));
  player.disconnect();
  cards.replaceChildren();
  drawMore();
  count.textContent = found.length + " of " + rows.length;
}
[search, sort, order].forEach((input) => input.addEventListener("input", update));
more.addEventListener("click", drawMore);
update();
"""


def write_gallery(uri: str, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the page as one HTML file without external resources.

    Args:
        uri: of the page, usually `OUTPUT/gallery.html`; local or S3.
        rows: of the generated table, with `COLUMNS`; their videos' paths start at the page.

    Raises:
        InputError: a video's path is absolute or a URI: the page would not survive being moved or served.
    """
    write_bytes(uri, render_gallery(title, rows).encode())


def render_gallery(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page's HTML; arguments and errors as for `write_gallery`."""
    data = {
        "columns": [*COLUMNS[:-1], "video"],
        "page": PAGE_ROWS,
        "rows": [[*(row[name] for name in COLUMNS[:-1]), video_link(row["video_uri"])] for row in rows],
    }
    # Inside a script, the only text that could end it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    options = "".join(f'<option value="{name}">{name}</option>' for name in SORTED_BY)
    return "\n".join(
        [
            *page_head(title, STYLE),
            '<form onsubmit="return false">'
            '<input id="search" type="search" placeholder="words of the prompt, an id, a seed" aria-label="search">'
            f'<label>by <select id="sort">{options}</select></label>'
            '<select id="order" aria-label="order"><option value="up">up</option><option value="down">down</option>'
            '</select><output id="count"></output></form>',
            '<main class="cards" id="cards"></main>',
            '<p><button id="more" hidden>more</button></p>',
            "<noscript>This page needs JavaScript; the videos lie beside it.</noscript>",
            f'<script type="application/json" id="rows">{text}</script>',
            f"<script>{SCRIPT}</script>",
            "</html>",
            "",
        ]
    )
