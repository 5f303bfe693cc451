"""Where things are: a local path, `file://` or `s3://bucket/key`, all read and written alike.

Writing is all or nothing: a temporary name and a rename on a local disk, one object on S3. The S3 endpoint and the
credentials come from the standard AWS variables (`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_REGION`, ...). What
the layout of an output means is `store.py`'s business.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from simda.errors import InputError, StorageError

TEMPORARY_PREFIX = ".tmp-"
S3_ATTEMPTS = 4
"""Of one request, within a second or two; what failed even so is repeated as a whole (`patiently`)."""
PATIENCE_S = 45.0
"""How long storage may not answer. Less than videos are given to be read (60 s): it is not the video's fault."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTL|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|RequestTimeout"
    r"|HTTP status 5\d\d|curlCode|ServiceUnavailable|SlowDown|InternalError|Unexpected end of stream"
)
S3_CONNECT_TIMEOUT_S, S3_REQUEST_TIMEOUT_S = 5, 20
MEMBER = re.compile(r"(?P<file>.+\.tar)!/(?P<name>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
"""A file within a tar file, and where its bytes are: `shard.tar!/name.mp4@OFFSET+SIZE`."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Result = TypeVar("Result")


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of `uri` and the path on it (absolute locally, `bucket/key` on S3).

    Raises:
        InputError: empty, a scheme other than `file` and `s3`, or S3 without a bucket.
    """
    if not uri:
        raise InputError("an empty path; give a local path, file:///path or s3://bucket/key")
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme == "file":
        return fs.LocalFileSystem(), os.path.abspath(unquote(urlsplit(uri).path))
    if scheme != "s3":
        raise InputError(f"{uri}: the scheme {scheme}:// is not known; use a local path, file:// or s3://")
    path = rest.strip("/")
    if not path:
        raise InputError(f"{uri} names no bucket; write s3://bucket/key")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _s3_filesystem(path.partition("/")[0], endpoint, region), path


@lru_cache(maxsize=32)
def _s3_filesystem(bucket: str, endpoint: str | None, region: str | None) -> fs.S3FileSystem:
    settings: dict[str, Any] = {
        "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        "connect_timeout": S3_CONNECT_TIMEOUT_S,
        "request_timeout": S3_REQUEST_TIMEOUT_S,
        # A small file is one request, not the three of an upload in parts.
        "allow_delayed_open": True,
    }
    if endpoint:
        return fs.S3FileSystem(endpoint_override=endpoint, region=region or "us-east-1", **settings)
    if not region:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError as error:
            raise InputError(f"s3://{bucket}: {reason_of(error)}; check the bucket's name and set AWS_REGION") from None
    return fs.S3FileSystem(region=region, **settings)


def patiently(uri: str, action: Callable[[], Result]) -> Result:
    """What `action` gives; where S3 is too busy or does not answer, it is repeated with growing pauses.

    Args:
        uri: what it is about, for messages.
        action: may be repeated without harm.

    Raises:
        StorageError: S3 gave no answer for `PATIENCE_S`.
        OSError: any other fault, at once.
    """
    if is_local(uri):
        return action()
    started, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        try:
            return action()
        except OSError as error:
            if not TRANSIENT.search(str(error)):
                raise
            if time.monotonic() - started + pause_s > PATIENCE_S:
                raise StorageError(
                    f"{uri}: the storage did not answer for {PATIENCE_S:g} s: {reason_of(error)}; check it and the "
                    "AWS_* variables, then run the same command again"
                ) from error
            logging.getLogger(__name__).warning("%s: %s; trying again", uri, reason_of(error))
        # Many workers that come back at the same moment would find it as busy again.
        time.sleep(random.uniform(pause_s / 2, pause_s))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def is_local(uri: str) -> bool:
    """Whether `uri` lies on this machine's filesystem."""
    return "://" not in uri or uri.startswith("file://")


def join_uri(uri: str, relative: str) -> str:
    """`relative` under `uri`; returned as it is when it is absolute or a URI itself."""
    if "://" in relative or os.path.isabs(relative):
        return relative
    return f"{uri.rstrip('/')}/{relative}" if relative else uri


def exists(uri: str) -> bool:
    """Whether a file or directory (on S3: any object under the prefix) is there.

    Raises:
        InputError: the storage cannot be reached.
    """
    filesystem, path = open_uri(uri)
    return get_info(filesystem, path, uri).type != fs.FileType.NotFound


def get_info(filesystem: fs.FileSystem, path: str, uri: str) -> fs.FileInfo:
    """What lies at `path`; failure to reach the storage is told in words.

    Raises:
        InputError: no access, no such bucket.
        StorageError: it does not answer.
    """
    try:
        return patiently(uri, lambda: filesystem.get_file_info(path))
    except OSError as error:
        raise InputError(
            f"{uri} cannot be reached: {reason_of(error)}; check the path, and for S3 the AWS_* variables"
        ) from None


def read_bytes(uri: str) -> bytes:
    """A file's content.

    Raises:
        InputError: missing, a directory, or not readable.
    """
    filesystem, path = open_uri(uri)
    found = get_info(filesystem, path, uri).type
    if found != fs.FileType.File:
        what = "is a directory, not a file" if found == fs.FileType.Directory else "does not exist"
        raise InputError(f"{uri} {what}; give the path of a file")
    try:
        return patiently(uri, lambda: _read(filesystem, path))
    except OSError as error:
        raise InputError(f"{uri} cannot be read: {reason_of(error)}") from None


def _read(filesystem: fs.FileSystem, path: str) -> bytes:
    # Not a stream, which asks S3 for 256 KiB at a time.
    with filesystem.open_input_file(path) as file:
        return file.read()


def read_text(uri: str) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: missing, unreadable, or not UTF-8.
    """
    data = read_bytes(uri)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{uri} is not UTF-8 text (line {line}); save it as UTF-8") from None


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a file so that a reader sees all of it or nothing, also when the writer is killed.

    Raises:
        StorageError: the storage does not take it.
    """
    filesystem, path = open_uri(uri)
    try:
        if isinstance(filesystem, fs.LocalFileSystem):
            with whole_file(path) as partial, open(partial, "wb") as file:
                file.write(data)
        else:
            patiently(uri, lambda: _put(filesystem, path, data))
    except OSError as error:
        raise StorageError(
            f"{uri} cannot be written: {reason_of(error)}; free or repair the storage and run the same command again"
        ) from error


def _put(filesystem: fs.FileSystem, path: str, data: bytes | memoryview) -> None:
    with filesystem.open_output_stream(path, compression=None) as stream:
        stream.write(data)


@contextmanager
def whole_file(path: str | os.PathLike[str], survives_power_loss: bool = True) -> Iterator[str]:
    """Give a temporary name beside `path`; it becomes `path` when the block ends well, and is removed if not.

    Args:
        survives_power_loss: wait until the disk has it. Without, a file may be lost with the machine, though not with
            the process: for what is made again in less time than the disk takes.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{Path(path).suffix}")
    try:
        yield partial
        if survives_power_loss:
            _flush(partial)
        os.replace(partial, path)
        if survives_power_loss:
            _flush(folder)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


@contextmanager
def storage_faults(uri: str) -> Iterator[None]:
    """A disk that is full, or a file that may not grow, while `uri` is made is a `StorageError` in words."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageError(
            f"{uri} cannot be written: {reason_of(error)}; free or repair the storage and run the same command again"
        ) from error


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def member_uri(uri: str, name: str, offset: int, size: int) -> str:
    """The URI of a file within a tar file, whose `size` bytes begin at `offset`; `local_copy` reads it."""
    return f"{uri}!/{name}@{offset}+{size}"


def readable_name(uri: str) -> str:
    """`uri` without the place of its bytes, if it is a file within a tar file; to compare and to show."""
    member = MEMBER.fullmatch(uri)
    return f"{member['file']}!/{member['name']}" if member else uri


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A local path with the content of `uri`: the file itself, or a temporary copy for the length of the block.

    Raises:
        InputError: missing or not readable.
    """
    if member := MEMBER.fullmatch(uri):
        with tempfile.TemporaryDirectory(prefix="simda-") as folder:
            # Of its name only the ending, which decoders look at: a member may be called anything.
            copy = Path(folder) / f"member{os.path.splitext(member['name'])[1]}"
            copy.write_bytes(read_range(member["file"], int(member["offset"]), int(member["size"])))
            yield str(copy)
        return
    if is_local(uri):
        yield open_uri(uri)[1]
        return
    with tempfile.TemporaryDirectory(prefix="simda-") as folder:
        copy = Path(folder) / uri.rstrip("/").rpartition("/")[2]
        copy.write_bytes(read_bytes(uri))
        yield str(copy)


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Some bytes of a file.

    Raises:
        InputError: missing, not readable, or shorter.
    """
    filesystem, path = open_uri(uri)
    try:
        with filesystem.open_input_file(path) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise InputError(f"{uri} cannot be read: {reason_of(error)}") from None
    if len(data) != size:
        raise InputError(f"{uri} ends before byte {offset + size}; it was changed, write it again and plan anew")
    return data


def reason_of(error: OSError) -> str:
    """The words of an error, on one line."""
    return error.strerror or str(error).splitlines()[0]
