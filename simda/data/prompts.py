"""Prompt manifests: one row per prompt, from CSV, TSV, JSONL, JSON, Parquet, or a text file of one prompt a line.

Only the prompt is required; `prompt_id`, `seed` and the settings of `SETTINGS` may be columns of their own, and a row
that leaves one empty takes the command's setting. Here live the checks (all faults of a file in one message) and
the identity of a row: its id and its seed depend on the row alone, never on its place in the file.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from simda.config import MAX_COUNT, MAX_GUIDANCE, SchedulerName
from simda.data.csv_table import nearest_name
from simda.data.record_list import RECORD_SUFFIXES, RecordList, as_text, read_records, suffix_of
from simda.data.schema import derived_id
from simda.data.uris import read_text
from simda.errors import InputError

MAX_SEED = 2**63 - 1
PROMPT_COLUMNS = ("prompt", "Prompt", "prompt_en")
"""What the prompt's column is called, here and in the lists of PartiPrompts and VBench."""
TEXT_SUFFIX = ".txt"
# An id becomes a file name, of which file systems allow 255 bytes.
PROMPT_ID = re.compile(r"\w([\w.\- ]*[\w-])?")
MAX_ID_BYTES = 200
MAX_FAULTS_SHOWN = 50


@dataclass(frozen=True)
class Setting:
    """A column that overrides a setting of the command: how it is read, and what is allowed."""

    parse: Callable[[str], Any]
    is_allowed: Callable[[Any], bool]
    words: str


_COUNT = Setting(int, lambda value: 0 < value <= MAX_COUNT, f"a whole number from 1 to {MAX_COUNT}")
_SHARE = Setting(float, lambda value: 0 <= value <= 1, "a share, from 0 to 1")
_SCHEDULERS = get_args(SchedulerName)
SETTINGS: dict[str, Setting] = {
    "num_frames": _COUNT,
    "height": _COUNT,
    "width": _COUNT,
    "fps": Setting(float, lambda value: 0 < value <= 1000, "a number above 0, at most 1000"),
    "num_inference_steps": _COUNT,
    "guidance_scale": Setting(float, lambda value: 0 <= value <= MAX_GUIDANCE, f"a number from 0 to {MAX_GUIDANCE}"),
    "negative_prompt": Setting(str, lambda value: True, "text"),
    "scheduler": Setting(str, lambda value: value in _SCHEDULERS, f"one of {', '.join(_SCHEDULERS)}"),
    "eta": _SHARE,
    "guidance_rescale": _SHARE,
    "guidance_start": _SHARE,
    "guidance_end": _SHARE,
    "noise_correlation": _SHARE,
    "timestep_shift": Setting(float, lambda value: 0 < value <= 100, "a number above 0, at most 100"),
}
# Columns that have been there from the start count in an id also where they are empty: ids never change.
NUMBERS_IN_IDS = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale")


@dataclass(frozen=True)
class PromptRow:
    """A video to generate.

    Attributes:
        prompt_id: unique in its file; usable as a file name.
        seed: of the row's own random generator, 0 to 2**63 - 1.
        settings: by the names of `SETTINGS`; what is not there is the command's.
        where: in the file, as "line 2".
    """

    prompt_id: str
    prompt: str
    seed: int
    settings: Mapping[str, Any]
    where: str


def read_prompts(
    uri: str,
    base_seed: int = 0,
    num_videos_per_prompt: int = 1,
    prompt_column: str | None = None,
    check: Callable[[PromptRow], Sequence[str]] = lambda row: (),
    settings: Mapping[str, Setting] = SETTINGS,
) -> list[PromptRow]:
    """Read and check a prompt manifest.

    A row without `prompt_id` gets one derived from everything in it that decides its video; the second of two equal
    rows counts as another video, so its id (and with it its seed) takes its number among the equal ones. A row without
    `seed` gets `row_seed(prompt_id, base_seed)`. Columns that are unknown are ignored with a notice, unless their
    name comes close to a known one: that is a fault.

    Args:
        uri: local path, `file://` or `s3://`; its ending tells the format.
        base_seed: changes all derived seeds.
        num_videos_per_prompt: rows of each row of the file. The first is as it would be alone; the n-th has `-n` after
            its id and a seed of its own.
        prompt_column: where the prompt stands; None for the first of `PROMPT_COLUMNS` that is there.
        check: faults of a row in the eyes of the caller.
        settings: the columns that may stand beside the prompt, its id and its seed.

    Raises:
        InputError: the file cannot be read, has no rows, or has faults; all of them are listed with their lines.
    """
    table = _read_lines(uri) if suffix_of(uri) == TEXT_SUFFIX else _read_records(uri, prompt_column, settings)
    column = _find_prompt_column(uri, table.columns, prompt_column)
    faults = [*_column_faults(uri, table.columns, column, settings), *table.faults]
    rows: list[PromptRow] = []
    equal_rows: Counter[str] = Counter()
    first_place: dict[str, str] = {}
    for where, record in table.records:
        row, row_faults = _read_row(where, record, column, settings, equal_rows, base_seed)
        copies = [] if row is None else _copies(row, num_videos_per_prompt, base_seed)
        row_faults += check(row) if row else ()
        for copy in copies:
            if copy.prompt_id in first_place:
                row_faults.append(f"prompt_id {copy.prompt_id!r} is also that of {first_place[copy.prompt_id]}")
            first_place.setdefault(copy.prompt_id, where)
        faults += [f"{where}: {fault}" for fault in row_faults]
        rows += copies
    if faults:
        shown = faults[:MAX_FAULTS_SHOWN]
        more = f"\n  ... and {len(faults) - len(shown)} more" if len(faults) > len(shown) else ""
        raise InputError(f"{uri} has {len(faults)} fault(s):\n  " + "\n  ".join(shown) + more)
    if not rows:
        raise InputError(f"{uri} has no rows; write one prompt per line")
    return rows


def row_seed(prompt_id: str, base_seed: int = 0) -> int:
    """The seed of a row that names none: a hash of its id, 0 to 2**32 - 1."""
    digest = hashlib.sha256(f"{base_seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _read_lines(uri: str) -> RecordList:
    # Not splitlines(): a form feed or a Unicode line separator may stand in a prompt.
    lines = enumerate(read_text(uri).split("\n"), start=1)
    return RecordList(("prompt",), ((f"line {number}", {"prompt": line}) for number, line in lines if line.strip()))


def _read_records(uri: str, prompt_column: str | None, settings: Iterable[str]) -> RecordList:
    if suffix_of(uri) not in RECORD_SUFFIXES:
        raise InputError(f"{uri} is no list of prompts; its name must end in {', '.join((*RECORD_SUFFIXES, '.txt'))}")
    columns = (prompt_column,) if prompt_column else PROMPT_COLUMNS
    return read_records(uri, (*columns, "prompt_id", "seed", *settings))


def _find_prompt_column(uri: str, columns: Sequence[str], prompt_column: str | None) -> str:
    wanted = (prompt_column,) if prompt_column else PROMPT_COLUMNS
    for name in wanted:
        if name in columns:
            return name
    near = nearest_name(wanted[0], columns)
    raise InputError(
        f"{uri} has no column {wanted[0]!r}; its columns are {', '.join(map(repr, columns))}"
        + (f"; is it {near!r}?" if near else "")
        + "; set prompt_column to the column with the prompts"
    )


def _column_faults(uri: str, columns: Sequence[str], prompt_column: str, settings: Iterable[str]) -> list[str]:
    known = ("prompt", "prompt_id", "seed", *settings)
    faults, ignored = [], []
    for name in columns:
        if name == prompt_column or name in known[1:]:
            continue
        near = nearest_name(name, known)
        if near and near not in columns and near != "prompt":
            faults.append(f"line 1: unknown column {name!r}; did you mean {near!r}?")
        else:
            ignored.append(name)
    if ignored:
        logging.getLogger(__name__).warning("%s: column(s) %s are ignored", uri, ", ".join(map(repr, ignored)))
    return faults


def _read_row(
    where: str,
    record: Mapping[str, Any],
    prompt_column: str,
    known: Mapping[str, Setting],
    equal_rows: Counter[str],
    base_seed: int,
) -> tuple[PromptRow | None, list[str]]:
    values, faults = {}, []
    for name in (prompt_column, "prompt_id", "seed", *known):
        try:
            values[name] = as_text(record.get(name))
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if faults:
        return None, faults
    settings: dict[str, Any] = {}
    for name, setting in known.items():
        if values[name]:
            settings[name] = _parse(values[name], setting)
            if settings[name] is None:
                faults.append(f"{name}={values[name]!r} is not {setting.words}")
    prompt, prompt_id = values[prompt_column], values["prompt_id"]
    seed = _read_seed(values["seed"])
    if values["seed"] and seed is None:
        faults.append(f"seed={values['seed']!r} is not a whole number from 0 to {MAX_SEED}")
    if not prompt:
        faults.append("the prompt is empty")
    if prompt_id and not (PROMPT_ID.fullmatch(prompt_id) and len(prompt_id.encode()) <= MAX_ID_BYTES):
        faults.append(
            f"prompt_id {prompt_id!r} cannot name a file; use letters, digits, '.', '_', '-' and blanks, "
            f"at most {MAX_ID_BYTES} bytes"
        )
    if faults:
        return None, faults
    if not prompt_id:
        content = _content_id(prompt, seed, settings)
        equal_rows[content] += 1
        prompt_id = content if equal_rows[content] == 1 else derived_id(content, equal_rows[content])
    seed = row_seed(prompt_id, base_seed) if seed is None else seed
    return PromptRow(prompt_id, prompt, seed, settings, where), []


def _content_id(prompt: str, seed: int | None, settings: Mapping[str, Any]) -> str:
    numbers = {name: settings.get(name) for name in NUMBERS_IN_IDS}
    others = {name: value for name, value in settings.items() if name not in (*NUMBERS_IN_IDS, "negative_prompt")}
    return derived_id("prompt", prompt, settings.get("negative_prompt"), seed, numbers | others)


def _copies(row: PromptRow, number: int, base_seed: int) -> list[PromptRow]:
    copies = [row]
    for place in range(2, number + 1):
        prompt_id = f"{row.prompt_id}-{place}"
        # With the first one's seed in it: where that was given, the others follow it and not the command's.
        seed = row_seed(f"{prompt_id}:{row.seed}", base_seed)
        copies.append(PromptRow(prompt_id, row.prompt, seed, row.settings, row.where))
    return copies


def _parse(text: str, setting: Setting) -> Any:
    try:
        value = setting.parse(text)
    except ValueError:
        return None
    return value if setting.is_allowed(value) else None


def _read_seed(text: str) -> int | None:
    try:
        seed = int(text)
    except ValueError:
        return None
    return seed if 0 <= seed <= MAX_SEED else None
