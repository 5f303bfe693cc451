"""Rows of a list against the videos that are there already: under one id, only one video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simda.errors import ConfigError

MAX_CHANGES_SHOWN = 20


def check_unchanged(
    rows: Iterable[Mapping[str, Any]], done: Iterable[Mapping[str, Any]], names: Sequence[str], output: str
) -> None:
    """Refuse rows whose video is there already, but was made from other words or settings.

    Args:
        rows: with `prompt_id` and the values of `names`, as they are wanted.
        done: the same of finished videos; None and "" are the same.

    Raises:
        ConfigError: names the changes; kept in silence, the video would not be that of the row.
    """
    wanted = {row["prompt_id"]: row for row in rows}
    changes = [
        f"{row['prompt_id']}: {name}: {former.get(name)!r} -> {row[name]!r}"
        for former in done
        if (row := wanted.get(former["prompt_id"]))
        for name in names
        if (former.get(name) or None) != (row[name] or None)
    ]
    if changes:
        more = f"\n  ... and {len(changes) - MAX_CHANGES_SHOWN} more" if len(changes) > MAX_CHANGES_SHOWN else ""
        raise ConfigError(
            f"output={output} has videos of other rows under the same prompt_id:\n  "
            + "\n  ".join(changes[:MAX_CHANGES_SHOWN])
            + f"{more}\nGive the changed rows other ids, or give another output."
        )
