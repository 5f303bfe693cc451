"""Base models that lie in an object store: copied once to this machine, whole or not at all.

Where the copy is follows from the content's names, sizes and versions, so that a model that was changed is copied anew.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import constants
from pyarrow import fs

from simda.data.uris import open_uri
from simda.errors import InputError

SUFFIXES = (".json", ".txt", ".safetensors")


def copy_stored_model(uri: str, parts: Sequence[str]) -> Path:
    """A local diffusers directory with the content of an `s3://` prefix.

    Args:
        uri: the prefix under which the parts lie.
        parts: the folders that are needed; of these, configurations, vocabularies and safetensors.

    Raises:
        InputError: there is no such model, or it cannot be read.
    """
    filesystem, prefix = open_uri(uri)
    try:
        found = filesystem.get_file_info(fs.FileSelector(prefix, recursive=True, allow_not_found=True))
        files = {_within(info.path, prefix): info for info in found if info.type == fs.FileType.File}
        wanted = {name: info for name, info in files.items() if _is_wanted(name, parts)}
        if not wanted:
            raise InputError(f"base_model={uri}: there is nothing of a diffusers directory under it")
        digest = hashlib.sha256(uri.encode())
        for name, info in sorted(wanted.items()):
            digest.update(f"{name} {info.size} {info.mtime_ns}".encode())
        target = Path(constants.HF_HOME, "simda-models", digest.hexdigest()[:32])
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as scratch:
            for name in wanted:
                path = Path(scratch, "model", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                fs.copy_files(f"{prefix}/{name}", str(path), filesystem, fs.LocalFileSystem())
            try:
                os.rename(Path(scratch, "model"), target)
            except OSError:
                # Another process was faster.
                if not target.is_dir():
                    raise
        return target
    except OSError as error:
        raise InputError(f"base_model={uri} cannot be copied: {str(error).splitlines()[0]}") from None


def _within(path: str, prefix: str) -> str:
    return path[len(prefix) :].lstrip("/")


def _is_wanted(name: str, parts: Sequence[str]) -> bool:
    path = PurePosixPath(name)
    doubled = ".fp16." in path.name or ".non_ema." in path.name
    return len(path.parts) == 2 and path.parts[0] in parts and path.suffix in SUFFIXES and not doubled
