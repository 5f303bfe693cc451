"""The errors that this project raises for people: what was wrong, the value, what is allowed, what to do.

Internal invariants are `assert`; everything that a setting, a file or a row can cause is one of these.
"""

from __future__ import annotations


class SimdaError(ValueError):
    """Something that a person gave cannot be used; a command that meets one before it works on any row exits with 2."""


class ConfigError(SimdaError):
    """A setting is unknown, out of range, or contradicts another one."""


class InputError(SimdaError):
    """A file, table or directory is missing, unreadable, or not what the command takes."""


class VideoError(InputError):
    """One video cannot be read as asked; in a pipeline it becomes a row of the failures table."""


class ModelMismatchError(SimdaError):
    """Two things do not belong together: an adapter and a base, a latents table and a VAE, a checkpoint and a run."""


class StorageError(SimdaError):
    """An output cannot be written to: the disk is full or gone, the storage does not answer. It is no row's fault: the
    job stops, and the same command goes on once there is space."""


class MachineError(SimdaError):
    """This machine cannot do the work now, whatever the settings are."""
