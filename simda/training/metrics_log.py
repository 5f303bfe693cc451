"""The lines of a run, `OUTPUT/metrics.jsonl`: one per so many steps, written by rank 0, shown by the driver.

The file is replaced whole at each write, so that readers never see half a line and a run that resumes can take back the
steps that it is going to repeat. It is also how progress reaches the terminal: workers may be on other machines, the
output is visible from everywhere.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from simda.data.store import OutputStore
from simda.data.uris import exists, read_text, write_bytes
from simda.errors import SimdaError
from simda.training.curves_plot import PLOT_FILE, plot_curves

METRICS_FILE = "metrics.jsonl"
WRITE_EVERY_S = 2.0
POLL_EVERY_S = 1.0


class MetricsLog:
    """Writes the curves.

    Args:
        store: the output of the run.
        num_steps_done: where the run goes on; lines of later steps are dropped.
    """

    def __init__(self, store: OutputStore, num_steps_done: int) -> None:
        self._uri = store.uri_of(METRICS_FILE)
        self._rows = [row for row in read_metrics(store) if row["step"] <= num_steps_done]
        self._last_write_s = 0.0

    def append(self, row: dict[str, Any]) -> None:
        """Add a line; it is written now, or with a later one if the last write was a moment ago."""
        self._rows.append(row)
        if time.monotonic() - self._last_write_s >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write all lines."""
        write_bytes(self._uri, "".join(json.dumps(row) + "\n" for row in self._rows).encode())
        self._last_write_s = time.monotonic()


def read_metrics(store: OutputStore) -> list[dict[str, Any]]:
    """All lines of a run's curves, oldest first; none before the first is written."""
    uri = store.uri_of(METRICS_FILE)
    return [json.loads(line) for line in read_text(uri).splitlines()] if exists(uri) else []


@contextmanager
def shown_progress(store: OutputStore, num_steps: int, *add: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Print a line to stderr for each new line of the curves, from a thread, for the length of the block.

    However it ends, the curves are there as a picture.

    Args:
        add: are given each new line too.
    """
    stop, shown_before = threading.Event(), _last_step(read_metrics(store))
    takers = list(add)

    def hand_on(row: dict[str, Any]) -> None:
        for take in list(takers):
            try:
                take(row)
            except Exception as error:
                takers.remove(take)
                print(
                    f"the curves go on without {getattr(take, '__qualname__', take)}: {error!r}",
                    file=sys.stderr,
                    flush=True,
                )

    def follow() -> None:
        shown, stopped = shown_before, False
        while not stopped:
            stopped = stop.wait(POLL_EVERY_S)
            try:
                rows = read_metrics(store)
            except SimdaError as error:
                # Only the showing of what is trained elsewhere; the next look may find the storage again.
                print(f"no progress to show: {error}", file=sys.stderr, flush=True)
                continue
            for row in rows:
                if row["step"] > shown:
                    print(progress_line(row, num_steps), file=sys.stderr, flush=True)
                    hand_on(row)
            # Smaller than before when a failed worker has been replaced and goes on from an earlier step.
            shown = _last_step(rows)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
        write_bytes(store.uri_of(PLOT_FILE), plot_curves(read_metrics(store)))


def _last_step(rows: list[dict[str, Any]]) -> int:
    return rows[-1]["step"] if rows else 0


def progress_line(row: dict[str, Any], num_steps: int) -> str:
    """A line of the curves for people."""
    validation = f"  validation {row['validation_loss']:.4f}" if "validation_loss" in row else ""
    return (
        f"step {row['step']}/{num_steps}  loss {row['loss']:.4f}{validation}  {row['clips_per_s']:.1f} clips/s  "
        f"{row['seconds_left']:.0f} s left"
    )
