"""How a run is told to stop, and its workers with it: signals to the driver or a worker, machines that are taken away.

Glue of Ray Train, as `worker.py` is, which acts on what it is told here. Whoever is told first, all ranks know after
the same step, by the notices of `AdapterTrainer.step`.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig

from simda.errors import SimdaError

STOP_WITHIN_S = 120.0
"""How long a run that is told to stop may take to end its step and to write its checkpoint."""
LOOK_EVERY_S = 5.0
"""Between two looks for machines that are about to be taken away, as often as Ray Train looks itself."""
POLL_EVERY_S = 0.2
SAME_WISH_S = 2.0
"""Within which several signals to stop are one."""


@dataclass(frozen=True)
class Ending:
    """How a run ended where Ray Train shall not try again.

    Attributes:
        divergence: why it diverged, if it did: the next attempt would again.
        stopped: whether it was asked to stop before its last step.
    """

    divergence: str | None = None
    stopped: bool = False


class StopRequest:
    """An actor that carries word from the driver, which is told to stop, to the workers."""

    def __init__(self) -> None:
        self._asked, self._has_begun = asyncio.Event(), False

    async def ask(self) -> bool:
        """Ask for a stop; returns whether there are workers to follow it."""
        self._asked.set()
        return self._has_begun

    async def asked(self) -> None:
        """Returns once a stop is asked for."""
        self._has_begun = True
        await self._asked.wait()


def stoppable(fit: Callable[[], Ending], stop: Any) -> Ending:
    """Run `fit` on a thread; SIGTERM and SIGINT ask it to stop, which takes a step and a checkpoint.

    On the main thread Ray Train would abort workers at SIGINT, and at SIGTERM Ray would end this process and them.

    Args:
        stop: a `StopRequest`.

    Raises:
        KeyboardInterrupt: a later signal, too long a wait, or no workers yet.
    """
    ended: Future[Ending] = Future()

    def run() -> None:
        try:
            ended.set_result(fit())
        except BaseException as error:
            ended.set_exception(error)

    # A daemon, since it is left behind when the wait for it is given up.
    threading.Thread(target=run, name="ray-train", daemon=True).start()
    told = threading.Event()
    with told_to_stop(told):
        while not told.is_set() and not ended.done():
            told.wait(POLL_EVERY_S)
        if not ended.done():
            if not has_begun(stop):
                raise KeyboardInterrupt
            later = f"another signal, {SAME_WISH_S:g} s after the first or later, stops at once"
            print(f"stopping after this step and its checkpoint; {later}", file=sys.stderr)
        try:
            return ended.result(STOP_WITHIN_S)
        except TimeoutError:
            raise KeyboardInterrupt from None


def has_begun(stop: Any) -> bool:
    """Ask a `StopRequest` for a stop; returns whether there are workers to follow it."""
    try:
        return ray.get(stop.ask.remote())
    except RayActorError:
        return False


@contextmanager
def told_to_stop(told: threading.Event) -> Iterator[None]:
    """For the length of the block, the first SIGTERM or SIGINT sets `told`, a later one interrupts this process.

    `ray job stop` tells a job's command and its children, and a chain's command (`pipelines/run.py`) tells the step
    that it runs: what comes within a moment of the first is the same wish.
    """
    first_s: list[float] = []

    def note(*_: Any) -> None:
        first_s.append(time.monotonic())
        if first_s[-1] - first_s[0] > SAME_WISH_S:
            raise KeyboardInterrupt
        told.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class NoticedTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's own, whose workers note SIGTERM. Only their main threads, where this runs, may ask for signals."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """As soon as there are workers."""
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(note_sigterm)


class NoticedTorchConfig(TorchConfig):
    """Chooses the backend."""

    @property
    def backend_cls(self) -> type:
        """Which Ray Train starts."""
        return NoticedTorchBackend


_TOLD_TO_LEAVE = threading.Event()


def note_sigterm() -> None:
    """From now on, the first SIGTERM to this worker asks for a checkpoint before it ends."""
    ends_process = signal.getsignal(signal.SIGTERM)

    def note(*_: Any) -> None:
        _TOLD_TO_LEAVE.set()
        signal.signal(signal.SIGTERM, ends_process)

    signal.signal(signal.SIGTERM, note)


class WorkerLeavesError(SimdaError):
    """A worker was told to end, after a checkpoint from which others go on."""


class Notices:
    """What this rank is told from outside, and tells the others after a step: to stop, that it leaves, to look.

    Args:
        stop: rank 0's `StopRequest`, None on the others.
    """

    def __init__(self, stop: Any) -> None:
        self._stop, self._asked = stop, None if stop is None else stop.asked.remote()
        self._looked_s = time.monotonic()
        self._saved_for: set[str] = set()

    @property
    def stops(self) -> bool:
        """Whether the driver asks to stop."""
        if self._asked is None or not ray.wait([self._asked], timeout=0)[0]:
            return False
        try:
            ray.get(self._asked)
        except RayActorError:
            # The driver cannot be heard; that is no word of it.
            self._asked = self._stop.asked.remote()
            return False
        return True

    def give(self) -> tuple[bool, bool, bool]:
        """For `AdapterTrainer.step`."""
        looks = self._asked is not None and time.monotonic() - self._looked_s > LOOK_EVERY_S
        return self.stops, _TOLD_TO_LEAVE.is_set(), looks

    def finds_preemption(self) -> bool:
        """Whether machines are about to be taken away for which there is no checkpoint yet; called by all ranks."""
        self._looked_s = time.monotonic()
        info = ray.train.get_preemption_info()
        found = set(info.preempted_node_ids) - self._saved_for if info else set()
        self._saved_for |= found
        return bool(found)
