"""Lists of edits: a video, what it shows, and what it shall show; from the same kinds of files as prompts.

A row's id, seed and settings follow the rules of `prompts.py`; here live the columns that only edits have, and the
video that a row names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from simda.data.prompts import SETTINGS, PromptRow, Setting, read_prompts
from simda.data.uris import is_local, join_uri

TARGET_COLUMN = "target_prompt"
EDIT_SETTINGS: dict[str, Setting] = {
    "video": Setting(str, bool, "a video"),
    "source_prompt": Setting(str, bool, "text"),
    "start_s": Setting(float, lambda value: 0 <= value < math.inf, "a time in seconds, 0 or more"),
    "stride": Setting(int, lambda value: value > 0, "a whole number above 0"),
    **{
        name: SETTINGS[name]
        for name in ("num_frames", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")
    },
}
"""Columns of a list of edits, beside `target_prompt`, `prompt_id` and `seed`; the first two are required."""


def read_edits(
    uri: str, base_seed: int = 0, check: Callable[[PromptRow], Sequence[str]] = lambda row: ()
) -> list[PromptRow]:
    """Read and check a list of edits.

    Args:
        uri: as `read_prompts`; names of videos start from where the list lies.
        base_seed: changes all derived seeds.
        check: faults of a row in the eyes of the caller.

    Returns:
        Rows whose prompt is the target, and whose settings have the `video`, as a URI, and the `source_prompt`.

    Raises:
        InputError: the file cannot be read, has no rows, or has faults; all of them are listed with their lines.
    """

    def check_edit(row: PromptRow) -> list[str]:
        return [*_edit_faults(row), *check(row)]

    folder = uri.rpartition("/")[0] or ("." if is_local(uri) else "")
    return [
        PromptRow(
            row.prompt_id,
            row.prompt,
            row.seed,
            {**row.settings, "video": join_uri(folder, row.settings["video"])},
            row.where,
        )
        for row in read_prompts(uri, base_seed, 1, TARGET_COLUMN, check_edit, EDIT_SETTINGS)
    ]


def _edit_faults(row: PromptRow) -> Iterator[str]:
    if not row.settings.get("video"):
        yield "the video is missing"
    source = row.settings.get("source_prompt", "")
    if not source:
        yield "source_prompt is empty; say in words what the video shows"
    elif source.casefold() == row.prompt.casefold():
        yield f"target_prompt is the same as source_prompt, {source!r}; there is nothing to edit"
