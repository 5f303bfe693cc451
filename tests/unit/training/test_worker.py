"""What people are told of workers that failed; what the trainer is told to do is tested with the command."""

from __future__ import annotations

import ray.train

from simda.errors import StorageError
from simda.training.worker import explain_failure


def test_the_reason_for_people_is_found_among_the_failures_of_other_workers():
    reason = StorageError("the disk is full")
    failures = {0: ConnectionError("peer went away"), 1: reason}
    assert explain_failure(ray.train.WorkerGroupError("two workers failed", failures)) is reason


def test_a_failure_without_one_is_not_taken_for_its_own_reason():
    error = ray.train.WorkerGroupError("a worker failed", {0: ZeroDivisionError("a fault of ours")})
    assert explain_failure(error) is None
