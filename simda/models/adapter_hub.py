"""Adapters on a model hub, by huggingface_hub: taken from there by name, and pushed there with their card."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from simda.data.uris import join_uri, read_bytes
from simda.errors import ConfigError, InputError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""What may be the name of a repository on the hub: OWNER/NAME."""


def download_adapter(name: str, file: str) -> str:
    """The local path of an adapter's file from the hub, downloaded once.

    Args:
        name: OWNER/NAME on the hub.

    Raises:
        InputError: it is neither there nor among those that were downloaded before.
    """
    try:
        return hf_hub_download(name, file)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"adapter={name}: there is no such directory, and the hub does not have {file} of it: {reason}"
        ) from None


def check_push(repo_id: str) -> None:
    """Refuse what could not be pushed at the end of a run, before it starts.

    Raises:
        ConfigError: the name is none of a repository, nobody is logged in, or the hub is switched off.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={repo_id!r}: {error}") from None
    if "/" not in repo_id:
        raise ConfigError(f"push_to_hub={repo_id!r} has no owner; write OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"push_to_hub={repo_id}: HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out")
    if not get_token():
        raise ConfigError(f"push_to_hub={repo_id}: nobody is logged in to the hub; run `hf auth login` or set HF_TOKEN")


def push_adapter(directory: str, files: tuple[str, ...], repo_id: str, private: bool = True) -> str:
    """Push an adapter's files as one commit; the repository is made if it is not there.

    Args:
        directory: of the adapter, local or `s3://`.
        private: whether a new repository is.

    Returns:
        The URL of the commit.

    Raises:
        InputError: the hub refuses.
    """
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="simda-push-") as folder:
        for file in files:
            (Path(folder) / file).write_bytes(read_bytes(join_uri(directory, file)))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="SimDA adapter"))
        except (HfHubHTTPError, OSError) as error:
            raise InputError(
                f"push_to_hub={repo_id}: {str(error).strip().splitlines()[0]}; the adapter is in {directory}, and "
                "the same command pushes it again"
            ) from None
