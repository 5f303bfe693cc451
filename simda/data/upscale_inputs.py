"""Which videos are upscaled, and what each of them shows: the output of a command that made videos, or any videos.

A row's id and seed depend on the row alone. How videos and their captions are found is told in `clip_plan.py`,
`captions.py` and `video_table.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from simda.data.captions import match_captions
from simda.data.clip_plan import VideoSource, find_video, list_videos
from simda.data.finished_rows import size_of
from simda.data.prompts import row_seed
from simda.data.schema import GENERATED, derived_id
from simda.data.store import RUN_FILE, OutputStore
from simda.data.uris import exists, join_uri
from simda.data.video_table import TableLayout, is_video_table, read_video_table
from simda.errors import ConfigError, InputError

MAX_STEM = 40


@dataclass(frozen=True)
class UpscaleRow:
    """A video to upscale.

    Attributes:
        prompt_id: of the row that made the video, or made from the video's name and version; usable as a file name.
        prompt: what it shows; "" if nobody said.
        seed: of the row's own random generator.
        video: its URI.
        version: time of its last change, in nanoseconds, or `clip_plan.MISSING`.
        source_bytes: as `finished_rows.size_of`.
    """

    prompt_id: str
    prompt: str
    seed: int
    video: str
    version: str
    source_bytes: int


def find_upscale_rows(videos: str, captions: str | None = None, base_seed: int = 0) -> list[UpscaleRow]:
    """All videos with their words.

    Args:
        videos: the output directory of `generate`, `edit` or `upscale`; or a directory, a pattern, a list or one file.
        captions: a CSV of captions; None for those of the list, or text files beside the videos. A video with none of
            them is upscaled without words, of one with several the first is taken.
        base_seed: changes all seeds.

    Raises:
        InputError: nothing there, an output that is not finished, or captions that cannot be read.
        ConfigError: captions for videos that have their prompts already.
    """
    if exists(join_uri(videos, RUN_FILE)):
        if captions:
            raise ConfigError(f"captions={captions} have no effect: the rows of videos={videos} have their prompts")
        return _made_videos(videos, base_seed)
    if is_video_table(videos):
        table = read_video_table(videos, TableLayout())
        found = {uri: span.captions for uri, spans in (table.spans or {}).items() for span in spans[:1]}
        return [_row(source, found.get(source.uri, ()), base_seed) for source in table.videos]
    sources = list_videos(videos)
    matched = match_captions(sources, captions).captions
    return [_row(source, matched.get(source.uri, ()), base_seed) for source in sources]


def _made_videos(uri: str, base_seed: int) -> list[UpscaleRow]:
    store = OutputStore(uri)
    rows = store.read_table(GENERATED, ["prompt_id", "prompt", "video_uri"]).to_pylist()
    if store.read_manifest() is None or not rows:
        raise InputError(f"videos={uri} is an unfinished output; run the command that writes it to the end")
    found = []
    for row in rows:
        source = find_video(store.uri_of(row["video_uri"]))
        seed = row_seed(row["prompt_id"], base_seed)
        found.append(UpscaleRow(row["prompt_id"], row["prompt"], seed, source.uri, source.version, size_of(source)))
    return found


def _row(source: VideoSource, captions: tuple[str, ...], base_seed: int) -> UpscaleRow:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", source.uri.rpartition("/")[2].rpartition(".")[0]).strip("_")
    digest = derived_id("upscale", source.uri, source.size_bytes, source.version).replace("-", "")
    prompt_id = f"{stem[:MAX_STEM] or 'video'}-{digest[:12]}"
    prompt = captions[0] if captions else ""
    return UpscaleRow(prompt_id, prompt, row_seed(prompt_id, base_seed), source.uri, source.version, size_of(source))
