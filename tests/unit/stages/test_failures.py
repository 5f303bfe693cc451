"""What is a row's fault becomes a row; what is not stops the job."""

from __future__ import annotations

import pytest
import torch

from simda.errors import MachineError, StorageError, VideoError
from simda.stages.failures import attempt_row
from simda.stages.generate_videos import is_out_of_memory


def attempt(error: Exception):
    def work() -> None:
        raise error

    return attempt_row("a", "stage", 2, work)


def test_a_row_s_own_fault_is_a_row() -> None:
    done, failure = attempt(VideoError("broken"))
    assert done is None
    assert failure == {"id": "a", "stage": "stage", "error_type": "VideoError", "message": "broken", "attempt": 2}


@pytest.mark.parametrize("error", [TypeError("x"), StorageError("full"), MachineError("busy")])
def test_faults_of_program_storage_and_machine_stop(error: Exception) -> None:
    with pytest.raises(type(error)):
        attempt(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ..."),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_broken_gpu_stops_its_worker_and_costs_no_other_row(error: Exception) -> None:
    with pytest.raises(MachineError, match="GPU is broken"):
        attempt(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: invalid configuration argument"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ],
)
def test_what_a_gpu_cannot_do_for_a_row_is_that_row_s_failure(error: Exception) -> None:
    assert attempt(error)[1] is not None


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_too_little_memory_is_for_smaller_groups(error: Exception) -> None:
    _, failure = attempt(error)
    assert failure is not None
    assert is_out_of_memory(failure)
