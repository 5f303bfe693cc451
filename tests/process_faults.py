"""Faults of processes for tests: workers of this session's Ray that are killed at their work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import psutil


def workers(title: str) -> list[psutil.Process]:
    """Living workers of this session's Ray that have `title` in the names that Ray gives them."""
    return [child for child in psutil.Process().children(recursive=True) if title in _name(child)]


@contextmanager
def as_soon_as(condition: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Acts once as soon as `condition` holds, beside what is done meanwhile; fails if it never did."""
    done, acted = Event(), Event()

    def watch() -> None:
        while not done.wait(0.002):
            if condition():
                act()
                acted.set()
                return

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert acted.is_set(), "the work ended before it could be disturbed"


@contextmanager
def worker_killed(title: str, when: Callable[[], object], num_workers: int = 1) -> Iterator[None]:
    """Kills one worker as soon as `num_workers` of them are there and `when` holds; fails if that never was."""
    found: list[psutil.Process] = []

    def is_time() -> object:
        found[:] = [worker for worker in found if worker.is_running()]
        if len(found) < num_workers:
            # Looked for beforehand: it takes longer than some of the work.
            found[:] = workers(title)
            return False
        return when()

    with as_soon_as(is_time, lambda: found[-1].kill()):
        yield


def is_without_work(process: psutil.Process) -> bool:
    """Whether it is Ray's and does nothing of a job's: one of its two agents on a machine, or a worker without a task.

    Agents are known by the script that they started as or the name that they take, workers by their name.
    """
    with suppress(psutil.Error):
        endings = ("Agent", "/agent.py", "/agent/main.py")
        return any(word.startswith("ray::IDLE") or word.endswith(endings) for word in process.cmdline())
    return False


def _name(process: psutil.Process) -> str:
    # Others end while they are looked at, or have ended and not been waited for.
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
