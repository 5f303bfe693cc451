"""A run's states on storage: all that it needs to go on exactly as if never stopped; the latest few, each one whole.

    OUTPUT/checkpoints/step-00000500/trainer_state.pt   `AdapterTrainer.state_dict`'s
                                     adapter/...        the adapter as it would be used now
                                     checkpoint.json    written last: the hash of the state

A state that was half-written has no mark, and one that was damaged later has another hash: then the one before it is
used. (Ray Train's own bookkeeping takes the last one for good, whatever has happened to it.)
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from pyarrow import fs

from simda.data.store import OutputStore
from simda.data.uris import exists, open_uri, patiently, read_bytes, write_bytes
from simda.errors import InputError

CHECKPOINTS_FOLDER = "checkpoints"
STATE_FILE, MARK_FILE = "trainer_state.pt", "checkpoint.json"
PREFIX = "step-"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest checkpoint that can be used.

    Attributes:
        name: of its directory, or None if there is none.
        faults: what is wrong with newer ones.
    """

    name: str | None
    faults: list[str] = field(default_factory=list)


def checkpoint_name(num_steps_done: int) -> str:
    """The directory of a checkpoint; in the order of the names, they are in the order of their steps."""
    return f"{PREFIX}{num_steps_done:08d}"


def pack_state(state: Mapping[str, Any]) -> memoryview:
    """A state as bytes: tensors, numbers and text only, so that no code can run when it is read."""
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
    return buffer.getbuffer()


def unpack_state(data: bytes | memoryview, uri: str) -> dict[str, Any]:
    """What `pack_state` packed, onto the CPU.

    Raises:
        InputError: damaged, or of another format version.
    """
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{uri} is not a readable checkpoint: {error}") from None
    version = state.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise InputError(
            f"{uri} has format version {version}, this version reads {FORMAT_VERSION}; train to a new output"
        )
    return state


class Checkpoints:
    """The checkpoints of a run. One process writes them, behind the steps that follow; leaving the context waits.

    Args:
        store: the output of the run.
        num_kept: latest checkpoints to keep.
    """

    def __init__(self, store: OutputStore, num_kept: int = 1) -> None:
        self._store, self._num_kept = store, num_kept
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        if error is None:
            self.wait()

    def save(self, num_steps_done: int, state: Mapping[str, Any], others: Mapping[str, bytes]) -> None:
        """Begin to write a checkpoint, once the one before is written; the state may change when this returns.

        Args:
            others: more files by their names.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, checkpoint_name(num_steps_done), pack_state(state), others)

    def wait(self) -> None:
        """Until the last one is written.

        Raises:
            StorageError: it could not be.
        """
        if self._writing:
            self._writing.result()

    def find(self) -> FoundCheckpoint:
        """The newest checkpoint that is whole."""
        faults = []
        for name in reversed(self._names()):
            try:
                self._read_state(name)
            except InputError as error:
                faults.append(str(error))
                continue
            return FoundCheckpoint(name, faults)
        return FoundCheckpoint(None, faults)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, in ascending order."""
        whole = [name for name in self._names() if exists(self._uri(name, MARK_FILE))]
        return [int(name.removeprefix(PREFIX)) for name in whole]

    def read_file(self, num_steps_done: int, file: str) -> bytes:
        """Another file of a checkpoint than the state."""
        return read_bytes(self._uri(checkpoint_name(num_steps_done), file))

    def load(self, name: str) -> dict[str, Any]:
        """The state of a checkpoint.

        Raises:
            InputError: it is missing, not whole, or of another format version.
        """
        return unpack_state(self._read_state(name), self._uri(name, STATE_FILE))

    def _write(self, name: str, state: memoryview, others: Mapping[str, bytes]) -> None:
        # A mark from before would vouch for what is now written over.
        self._store.delete_file(f"{CHECKPOINTS_FOLDER}/{name}/{MARK_FILE}")
        for file, data in others.items():
            write_bytes(self._uri(name, file), data)
        write_bytes(self._uri(name, STATE_FILE), state)
        mark = {"num_bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        write_bytes(self._uri(name, MARK_FILE), json.dumps(mark).encode())
        self._delete_old(name)

    def _delete_old(self, newest: str) -> None:
        filesystem = open_uri(self._store.uri)[0]
        for name in [name for name in self._names() if name <= newest][: -self._num_kept]:
            filesystem.delete_dir(open_uri(self._uri(name))[1])

    def _read_state(self, name: str) -> bytes:
        uri = self._uri(name, STATE_FILE)
        if not exists(self._uri(name, MARK_FILE)):
            raise InputError(f"{uri} was not written to its end")
        state = read_bytes(uri)
        try:
            expected = json.loads(read_bytes(self._uri(name, MARK_FILE)))["sha256"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{self._uri(name, MARK_FILE)} is damaged") from None
        if hashlib.sha256(state).hexdigest() != expected:
            raise InputError(f"{uri} is damaged: it is not what was written")
        return state

    def _names(self) -> list[str]:
        filesystem, path = open_uri(self._uri())
        selector = fs.FileSelector(path, allow_not_found=True)
        found = patiently(self._uri(), lambda: filesystem.get_file_info(selector))
        return sorted(info.base_name for info in found if info.base_name.startswith(PREFIX))

    def _uri(self, *parts: str) -> str:
        return self._store.uri_of("/".join((CHECKPOINTS_FOLDER, *parts)))
