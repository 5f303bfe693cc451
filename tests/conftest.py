"""Fixtures that several test packages share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
# By default, workers give way to all other processes, and so to the tests that run beside theirs.
os.environ.setdefault("RAY_worker_niceness", "0")
# By default, metrics reach their endpoint every ten seconds.
os.environ.setdefault("RAY_metrics_report_interval_ms", "500")

from collections.abc import Iterator

import pytest
import torch

from simda.data import run_lock
from simda.runtime import ray_session


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _released_outputs() -> Iterator[None]:
    yield
    run_lock.release_all()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the whole test session; commands that are called in this process use it."""
    with ray_session():
        yield
