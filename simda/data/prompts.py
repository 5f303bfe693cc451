"""The prompts CSV: one row per video to generate.

Only `prompt` is required; `prompt_id`, `negative_prompt`, `seed` and the sampling settings of `NUMBERS` may be columns
of their own, and a row that leaves one empty takes the command's setting. Here live the checks (all faults of a file in
one message) and the identity of a row: its id and its seed depend on the row alone, never on its place in the file.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from simda.data.csv_table import CsvRow, nearest_name, read_csv
from simda.data.schema import derived_id
from simda.errors import InputError

MAX_SEED = 2**63 - 1
NUMBERS: dict[str, tuple[Callable[[str], float], str]] = {
    "num_frames": (int, "a whole number above 0"),
    "height": (int, "a whole number above 0"),
    "width": (int, "a whole number above 0"),
    "fps": (float, "a number above 0"),
    "num_inference_steps": (int, "a whole number above 0"),
    "guidance_scale": (float, "a number, 0 or more"),
}
KNOWN_COLUMNS = ("prompt", "prompt_id", "negative_prompt", "seed", *NUMBERS)
# An id becomes a file name, of which file systems allow 255 bytes.
PROMPT_ID = re.compile(r"\w([\w.\- ]*[\w-])?")
MAX_ID_BYTES = 200
MAX_FAULTS_SHOWN = 50


@dataclass(frozen=True)
class PromptRow:
    """A video to generate; None stands for the command's setting.

    Attributes:
        prompt_id: unique in its file; usable as a file name.
        seed: of the row's own random generator, 0 to 2**63 - 1.
        height: pixels.
        width: pixels.
        line: of the CSV file, from 1.
    """

    prompt_id: str
    prompt: str
    negative_prompt: str | None
    seed: int
    num_frames: int | None
    height: int | None
    width: int | None
    fps: float | None
    num_inference_steps: int | None
    guidance_scale: float | None
    line: int


def read_prompts(uri: str, base_seed: int = 0) -> list[PromptRow]:
    """Read and check a prompts CSV.

    A row without `prompt_id` gets one derived from everything in it that decides its video; the second of two equal
    rows counts as another video, so its id (and with it its seed) takes its number among the equal ones. A row without
    `seed` gets `row_seed(prompt_id, base_seed)`. Columns that are unknown are ignored with a notice, unless their
    name comes close to a known one: that is a fault.

    Args:
        uri: local path, `file://` or `s3://`.
        base_seed: changes all derived seeds.

    Raises:
        InputError: the file cannot be read, has no rows, or has faults; all of them are listed with their lines.
    """
    table = read_csv(uri, required=("prompt",))
    faults = [*_column_faults(uri, table.columns), *table.faults]
    rows: list[PromptRow] = []
    equal_rows: Counter[str] = Counter()
    first_line: dict[str, int] = {}
    for record in table.rows:
        row, row_faults = _read_row(record, equal_rows, base_seed)
        faults += [f"line {record.line}: {fault}" for fault in row_faults]
        if row is None:
            continue
        if row.prompt_id in first_line:
            faults.append(
                f"line {row.line}: prompt_id {row.prompt_id!r} is also that of line {first_line[row.prompt_id]}"
            )
        first_line.setdefault(row.prompt_id, row.line)
        rows.append(row)
    if faults:
        shown = faults[:MAX_FAULTS_SHOWN]
        more = f"\n  ... and {len(faults) - len(shown)} more" if len(faults) > len(shown) else ""
        raise InputError(f"{uri} has {len(faults)} fault(s):\n  " + "\n  ".join(shown) + more)
    if not rows:
        raise InputError(f"{uri} has no rows below its first line; write one prompt per line")
    return rows


def row_seed(prompt_id: str, base_seed: int = 0) -> int:
    """The seed of a row that names none: a hash of its id, 0 to 2**32 - 1."""
    digest = hashlib.sha256(f"{base_seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _column_faults(uri: str, columns: tuple[str, ...]) -> list[str]:
    faults, ignored = [], []
    for name in columns:
        if name in KNOWN_COLUMNS:
            continue
        near = nearest_name(name, KNOWN_COLUMNS)
        if near and near not in columns:
            faults.append(f"line 1: unknown column {name!r}; did you mean {near!r}?")
        else:
            ignored.append(name)
    if ignored:
        logging.getLogger(__name__).warning("%s: column(s) %s are ignored", uri, ", ".join(map(repr, ignored)))
    return faults


def _read_row(record: CsvRow, equal_rows: Counter[str], base_seed: int) -> tuple[PromptRow | None, list[str]]:
    values, faults = record.values, []
    numbers: dict[str, float | None] = {}
    for name, (parse, allowed) in NUMBERS.items():
        numbers[name] = _read_number(values.get(name, ""), parse, minimum_excluded=name != "guidance_scale")
        if values.get(name) and numbers[name] is None:
            faults.append(f"{name}={values[name]!r} is not {allowed}")
    seed = _read_seed(values.get("seed", ""))
    if values.get("seed") and seed is None:
        faults.append(f"seed={values['seed']!r} is not a whole number from 0 to {MAX_SEED}")
    if not values["prompt"]:
        faults.append("the prompt is empty")
    prompt_id = values.get("prompt_id", "")
    if prompt_id and not (PROMPT_ID.fullmatch(prompt_id) and len(prompt_id.encode()) <= MAX_ID_BYTES):
        faults.append(
            f"prompt_id {prompt_id!r} cannot name a file; use letters, digits, '.', '_', '-' and blanks, "
            f"at most {MAX_ID_BYTES} bytes"
        )
    if faults:
        return None, faults
    negative_prompt = values.get("negative_prompt") or None
    if not prompt_id:
        content = derived_id("prompt", values["prompt"], negative_prompt, seed, numbers)
        equal_rows[content] += 1
        prompt_id = content if equal_rows[content] == 1 else derived_id(content, equal_rows[content])
    seed = row_seed(prompt_id, base_seed) if seed is None else seed
    return PromptRow(prompt_id, values["prompt"], negative_prompt, seed, line=record.line, **numbers), []  # type: ignore[arg-type]


def _read_number(text: str, parse: Callable[[str], float], minimum_excluded: bool) -> float | None:
    try:
        value = parse(text)
    except ValueError:
        return None
    allowed = math.isfinite(value) and (value > 0 if minimum_excluded else value >= 0)
    return value if allowed else None


def _read_seed(text: str) -> int | None:
    try:
        seed = int(text)
    except ValueError:
        return None
    return seed if 0 <= seed <= MAX_SEED else None
