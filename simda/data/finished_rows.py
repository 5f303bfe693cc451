"""What of a list of rows is finished already, in an output whose rows become videos.

Here lives the rule that under one id there is only one video. How an output is laid out is `store.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from simda.data.clip_plan import MISSING, VideoSource
from simda.data.schema import FAILURES, GENERATED
from simda.data.store import OutputStore
from simda.errors import ConfigError

MAX_CHANGES_SHOWN = 20
UNKNOWN_SIZE = -1
"""Of a source that is no longer there, or whose size was not recorded yet."""

Row = dict[str, Any]


@dataclass(frozen=True)
class FinishedRows:
    """What an output has.

    Attributes:
        resumes: whether the output was begun before.
        done: ids of the rows whose video is there.
        failed: attempts of the rows that failed and were not done since, by id.
    """

    resumes: bool
    done: Set[str] = frozenset()
    failed: Mapping[str, int] = field(default_factory=dict)

    def left(self, rows: Iterable[Row], retry_failed: bool) -> list[Row]:
        """The rows that are still to be done, in their order."""
        skipped = self.done if retry_failed else self.done | self.failed.keys()
        return [row for row in rows if row["prompt_id"] not in skipped]

    def with_attempts(self, rows: Iterable[Row]) -> list[Row]:
        """The rows with the number of their next `attempt`, from 1."""
        return [row | {"attempt": self.failed.get(row["prompt_id"], 0) + 1} for row in rows]


def find_finished(
    store: OutputStore,
    run_key: Mapping[str, Any],
    rows: Sequence[Row],
    compared: Sequence[str],
    columns: Sequence[str],
    former: Callable[[Row], Row],
) -> FinishedRows:
    """Look at an output before anything is written to it.

    Args:
        rows: as they are wanted, with `prompt_id`.
        compared: what decides a row's video, by its names in `rows`.
        columns: of the generated table that `former` needs.
        former: what a row of the generated table was made from, by the same names.

    Raises:
        ConfigError: the output is another run's, or has a video of a row that was changed since.
    """
    if not store.check_claim(run_key):
        return FinishedRows(resumes=False)
    made = store.read_table(GENERATED, columns).to_pylist()
    check_unchanged(rows, map(former, made), compared, store.uri)
    done = {row["prompt_id"] for row in made}
    return FinishedRows(True, done, standing_failures(store, done))


def standing_failures(store: OutputStore, done: Set[str]) -> dict[str, int]:
    """Attempts of the rows that failed and were not done since, by id."""
    return {row["id"]: row["attempt"] for row in store.read_table(FAILURES).to_pylist() if row["id"] not in done}


def check_unchanged(rows: Iterable[Row], done: Iterable[Row], names: Sequence[str], output: str) -> None:
    """Refuse rows whose video is there already, but was made from other words or settings.

    Args:
        rows: with `prompt_id` and the values of `names`, as they are wanted.
        done: the same of finished videos; None and "" are the same, and `UNKNOWN_SIZE` is the same as any.

    Raises:
        ConfigError: names the changes; kept in silence, the video would not be that of the row.
    """
    wanted = {row["prompt_id"]: row for row in rows}
    changes = [
        f"{row['prompt_id']}: {name}: {former.get(name)!r} -> {row[name]!r}"
        for former in done
        if (row := wanted.get(former["prompt_id"]))
        for name in names
        if UNKNOWN_SIZE not in (former.get(name), row[name]) and (former.get(name) or None) != (row[name] or None)
    ]
    if changes:
        more = f"\n  ... and {len(changes) - MAX_CHANGES_SHOWN} more" if len(changes) > MAX_CHANGES_SHOWN else ""
        raise ConfigError(
            f"output={output} has videos of other rows under the same prompt_id:\n  "
            + "\n  ".join(changes[:MAX_CHANGES_SHOWN])
            + f"{more}\nGive the changed rows other ids, or give another output."
        )


def size_of(source: VideoSource) -> int:
    """The size by which another video in the place of one is known, also where files are copied."""
    return UNKNOWN_SIZE if source.version == MISSING else source.size_bytes
