"""One run at a time on an output: whoever comes second is refused, and what was killed stands in nobody's way.

On a disk the lock is the kernel's (`flock`), which ends with its process. On S3 it is an object with the owner's name
that is written again every few seconds, and that another run may replace once nobody does. What an output holds is
`store.py`'s business.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session

from simda.data.uris import is_local, open_uri, reason_of
from simda.errors import ConfigError, StorageError

LOCK_FILE = "_lock.json"
STOP_SIGNAL = signal.SIGUSR2
"""Sent to the main thread when the lock is lost. Not SIGINT, which a run that was started in the background ignores."""
RENEW_EVERY_S = 10.0
EXPIRES_AFTER_S = 60.0
"""Of the storage's own clock, since the last renewal; several times `RENEW_EVERY_S`, so that a few may fail."""
POLL_EVERY_S = 1.0
REQUEST_ATTEMPTS = 5
REFUSED = (HTTPStatus.CONFLICT, HTTPStatus.PRECONDITION_FAILED)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
S3_FAULTS = (BotoCoreError, ClientError)

Owner = dict[str, Any]


def hold(uri: str, command: str) -> None:
    """Lock the output at `uri` for this process, until `release_all` or the process ends; again is no fault.

    Args:
        command: what the process does, for others to read.

    Raises:
        ConfigError: another run holds it, or nothing can be written there.
        StorageError: S3 does not answer.
    """
    filesystem, path = open_uri(uri)
    key = f"{filesystem.type_name}:{path}"
    if key in _held:
        return
    lock = FileLock(uri) if is_local(uri) else LeaseLock(uri)
    lock.acquire(_describe(command))
    _held[key] = lock


def release_all() -> None:
    """Let go of all that this process holds."""
    while _held:
        _held.popitem()[1].release()


class FileLock:
    """A lock on a disk, which other machines that share the disk see if its file system can lock."""

    def __init__(self, uri: str) -> None:
        self.uri, self.path = uri, Path(open_uri(uri)[1], LOCK_FILE)

    def acquire(self, owner: Owner) -> None:
        """Take it; raises as `hold`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open_locked()
            # Else its owner took the file away after it was opened here.
            while not self._is_there():
                os.close(self._file)
                self._open_locked()
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps(owner).encode())
        except OSError as error:
            raise ConfigError(
                f"output={self.uri} cannot be written to: {reason_of(error)}; give a directory that can"
            ) from error

    def _open_locked(self) -> None:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                with open(self._file) as file:
                    raise _refusal(self.uri, _parse(file.read())) from None
            if error.errno not in NO_LOCKS:
                raise
            logging.getLogger(__name__).warning(
                "%s: this file system has no locks; see to it that only one run at a time writes there", self.uri
            )

    def release(self) -> None:
        """Give it back, and remove its file."""
        if self._is_there():
            self.path.unlink()
        os.close(self._file)

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.path))
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class Lease:
    """What lies on S3: whose it is, the version of the object, and its age by the server's clock."""

    owner: Owner
    etag: str
    age_s: float


class LeaseLock:
    """A lock on S3: an object that is put only if it is still what was read last."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.bucket, _, folder = open_uri(uri)[1].partition("/")
        self.key = f"{folder}/{LOCK_FILE}".lstrip("/")
        self.is_lost = False
        self._ended = threading.Event()

    def acquire(self, owner: Owner) -> None:
        """Take it; if the machine of the one who has it cannot be asked, wait until it is renewed or expires.

        Raises:
            ConfigError, StorageError: as `hold`.
        """
        self._owner = owner | {"token": uuid.uuid4().hex}
        first: Lease | None = None
        try:
            while True:
                found = self._read()
                first = first or found
                if found is None:
                    taken = self._put(IfNoneMatch="*")
                elif _is_alive(found.owner) or (first and found.etag != first.etag):
                    raise _refusal(self.uri, found.owner)
                elif _is_dead(found.owner) or found.age_s >= EXPIRES_AFTER_S:
                    taken = self._put(IfMatch=found.etag)
                else:
                    if found is first:
                        print(f"{_refusal(self.uri, found.owner)}\nwaiting to see if it still is", file=sys.stderr)
                    time.sleep(POLL_EVERY_S)
                    continue
                if taken and self._is_ours():
                    break
        except S3_FAULTS as error:
            raise StorageError(f"output={self.uri} cannot be locked: {error}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(STOP_SIGNAL, _stop)
        threading.Thread(target=self._renew, name="renew run lock", daemon=True).start()

    def release(self) -> None:
        """Give it back."""
        self._ended.set()
        try:
            if not self.is_lost and self._is_ours():
                self._s3.delete_object(Bucket=self.bucket, Key=self.key)
        except S3_FAULTS as error:
            # It expires by itself.
            logging.getLogger(__name__).warning("%s: the lock was not removed: %s", self.uri, error)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_EVERY_S):
            try:
                # A put whose answer was lost has changed the version all the same: ours is ours in any version.
                self.is_lost = not (self._put(IfMatch=self._etag) or self._is_ours())
            except S3_FAULTS as error:
                logging.getLogger(__name__).warning("%s: the lock was not renewed: %s", self.uri, error)
            if self.is_lost and not self._ended.is_set():
                logging.getLogger(__name__).error(
                    "output=%s was taken over by another run, since this one did not answer for %g s; this one stops",
                    self.uri,
                    EXPIRES_AFTER_S,
                )
                signal.pthread_kill(threading.main_thread().ident or 0, STOP_SIGNAL)
                return

    @cached_property
    def _s3(self) -> Any:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        retries = {"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS}
        # pyarrow's file system cannot put on a condition.
        return get_session().create_client("s3", region_name=region or "us-east-1", config=Config(retries=retries))

    def _put(self, **condition: str) -> bool:
        """Write the object; whether the condition held. Servers that know no conditions put it in any case."""
        self._owner["num_renewed"] = self._owner.get("num_renewed", -1) + 1
        body = json.dumps(self._owner).encode()
        try:
            answer = self._s3.put_object(Bucket=self.bucket, Key=self.key, Body=body, **condition)
        except ClientError as error:
            if _status(error) in REFUSED or (_status(error) == HTTPStatus.NOT_FOUND and "IfMatch" in condition):
                return False
            raise
        self._etag = answer["ETag"]
        return True

    def _read(self) -> Lease | None:
        try:
            answer = self._s3.get_object(Bucket=self.bucket, Key=self.key)
            text = answer["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchKey":
                return None
            raise
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)
        return Lease(_parse(text.decode()), answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def _is_ours(self) -> bool:
        found = self._read()
        if found is None or found.owner.get("token") != self._owner["token"]:
            return False
        self._etag = found.etag
        return True


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def _describe(command: str) -> Owner:
    """This process, for other runs and for people."""
    return {
        "command": command,
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": _process_started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _parse(text: str) -> Owner:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        return {}


def _refusal(uri: str, owner: Mapping[str, Any]) -> ConfigError:
    who = "{command}, process {pid} on {host}, since {since}".format_map(
        {"command": "?", "pid": "?", "host": "?", "since": "?", **owner}
    )
    return ConfigError(
        f"output={uri} is being written to by another run ({who}); wait until it ends, stop it, or give another output"
    )


def _is_alive(owner: Mapping[str, Any]) -> bool:
    return owner.get("machine") == _machine() is not None and _still_runs(owner)


def _is_dead(owner: Mapping[str, Any]) -> bool:
    return owner.get("machine") == _machine() is not None and not _still_runs(owner)


def _still_runs(owner: Mapping[str, Any]) -> bool:
    return _process_started(owner["pid"]) == owner["process_started"] is not None


def _machine() -> str | None:
    """What tells the processes that this one can see from those of other machines and containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _process_started(pid: int) -> str | None:
    """When a process began, in the kernel's count; None if it is over: another one may have its number by now."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # The state comes first, the start is the 22nd of all fields.
    return None if fields[0] in "ZX" else fields[19]


_held: dict[str, FileLock | LeaseLock] = {}
atexit.register(release_all)
