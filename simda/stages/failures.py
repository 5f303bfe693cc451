"""The one place where a row's exceptions are caught: what was tried becomes a result or a row of the failures table.

Faults of a row (a broken video, a size that does not fit) are recorded and the job goes on. Faults of the program (a
misspelt attribute, a wrong argument), of the storage (a full disk) and of the machine (a broken GPU) are not a row's
fault and stop the job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from simda.errors import MachineError, StorageError

Result = TypeVar("Result")

PROGRAMMING_ERRORS = (
    TypeError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
    ImportError,
    SyntaxError,
)

ROWS_OWN = ("out of memory", "invalid argument", "invalid configuration argument")
"""What a GPU says of a row that is too large for it; it goes on working."""


def attempt_row(
    row_id: str, stage: str, attempt: int, work: Callable[[], Result]
) -> tuple[Result | None, dict[str, Any] | None]:
    """Do a row's work.

    Args:
        stage: the name of the stage, for the failures table.
        attempt: which attempt this is, from 1.

    Returns:
        (result, None), or (None, the row of the failures table).
    """
    try:
        return work(), None
    except (*PROGRAMMING_ERRORS, StorageError, MachineError):
        raise
    except Exception as error:
        if is_device_fault(error):
            told = str(error).splitlines()[0]
            raise MachineError(f"this worker's GPU is broken ({told}); run the same command again to go on") from error
        fields = {"stage": stage, "row_id": row_id, "attempt": attempt, "error_type": type(error).__name__}
        logging.getLogger(__name__).warning("%s %s: %s: %s", stage, row_id, type(error).__name__, error, extra=fields)
        return None, failure_row(row_id, stage, type(error).__name__, str(error), attempt)


def is_device_fault(error: Exception) -> bool:
    """Whether a GPU has failed: in its process every later call would fail too, whatever row it is for."""
    told = str(error)
    is_of_device = type(error).__name__ == "AcceleratorError" or told.startswith("CUDA error")
    return "CUDNN_STATUS_EXECUTION_FAILED" in told or (is_of_device and not any(own in told for own in ROWS_OWN))


def failure_row(row_id: str, stage: str, error_type: str, message: str, attempt: int = 1) -> dict[str, Any]:
    """A row of the failures table; the message is cut at 2,000 characters."""
    return {"id": row_id, "stage": stage, "error_type": error_type, "message": message[:2000], "attempt": attempt}
