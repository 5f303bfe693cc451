"""A run's curves on Weights & Biases or MLflow, if asked for and their extra is installed; beside metrics.jsonl.

They run in the driver, which sees each line of the curves once, so that workers need neither the package nor a login.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

from simda.data.schema import derived_id
from simda.data.uris import is_local, open_uri
from simda.errors import ConfigError

WandbMode = Literal["online", "offline"]
NOT_LOGGED = ("step", "seconds", "seconds_left")
MLFLOW_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
OUTPUT_TAG, ID_TAG = "simda.output", "simda.output_id"
"""The second is a hash of the first: URIs may hold what a search would trip over."""


class Tracker(Protocol):
    """What takes the lines of the curves."""

    def __call__(self, row: dict[str, Any]) -> None:
        """Take a line."""


def check_wandb(project: str | None) -> None:
    """Refuse what could not be tracked, before a run starts.

    Raises:
        ConfigError: the extra is not installed.
    """
    if project is not None:
        _check_installed("wandb", "Weights & Biases", f"wandb.project={project}")


def check_mlflow(experiment: str | None, tracking_uri: str | None) -> None:
    """Refuse what could not be tracked, before a run starts.

    Raises:
        ConfigError: the extra is not installed, or no server is named.
    """
    if experiment is None:
        return
    asked = f"mlflow.experiment={experiment}"
    _check_installed("mlflow", "MLflow", asked)
    if not (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
        raise ConfigError(f"{asked}: set mlflow.tracking_uri or MLFLOW_TRACKING_URI to the address of the server")


def _check_installed(package: str, name: str, asked: str) -> None:
    spec = importlib.util.find_spec(package)
    # A folder of that name, such as the files of earlier runs, is found too, without an origin.
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{asked}: {name} is not installed; run `pip install -c cluster/constraints.txt '.[{package}]'`, or leave "
            "the setting out"
        )


@contextmanager
def wandb_run(project: str | None, mode: WandbMode, output: str, config: Mapping[str, Any]) -> Iterator[Tracker]:
    """A run on Weights & Biases for the length of the block; one that goes on is continued under its name.

    Args:
        project: of the run; None tracks nothing.
        mode: "offline" needs no network and no account; `wandb sync` sends it later.
        output: URI of the run's output; decides its id. Files of a local one lie in OUTPUT/wandb, of others in ./wandb.
        config: all settings, to show.

    Raises:
        ConfigError: the service cannot be used: no login, or no connection.
    """
    if project is None:
        yield lambda row: None
        return
    import wandb

    folder = f"{open_uri(output)[1]}/wandb" if is_local(output) else "wandb"
    os.makedirs(folder, exist_ok=True)
    try:
        run = wandb.init(
            project=project,
            name=_name_of(output),
            id=derived_id("wandb", output)[:8],
            resume="allow",
            mode=mode,
            dir=folder,
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"wandb.project={project}: {reason}; log in, or use wandb.mode=offline") from None
    try:
        yield lambda row: run.log(_numbers(row), step=row["step"])
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


@contextmanager
def mlflow_run(
    experiment: str | None, tracking_uri: str | None, output: str, config: Mapping[str, Any]
) -> Iterator[Tracker]:
    """A run on an MLflow server for the length of the block; one that goes on is found by its output and continued.

    Lines are sent behind the training, and a server that is away for a while is tried again by MLflow; what it never
    took is told at the end, and costs nothing else.

    Args:
        experiment: of the run, made if new; None tracks nothing.
        tracking_uri: of the server; None takes that in MLFLOW_TRACKING_URI.
        output: URI of the run's output, kept in the tag `simda.output`.
        config: all settings; the parameters of a new run.

    Raises:
        ConfigError: the server cannot be reached, or refuses.
    """
    if experiment is None:
        yield lambda row: None
        return
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    try:
        with _few_retries():
            client = MlflowClient(tracking_uri=tracking_uri)
            run_id = _find_or_create(client, experiment, output, config)
    except MlflowException as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"mlflow.experiment={experiment}: {reason}; check mlflow.tracking_uri") from None
    sent: list[Any] = []

    def log(row: dict[str, Any]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, row["step"]) for name, value in _numbers(row).items()]
        sent.append(client.log_batch(run_id, metrics, synchronous=False))

    status = "FAILED"
    try:
        yield log
        status = "FINISHED"
    finally:
        missed: MlflowException | None = None
        for finish in (*(operation.wait for operation in sent), partial(client.set_terminated, run_id, status)):
            try:
                finish()
            except MlflowException as error:
                missed = error
        if missed:
            reason = " ".join(str(missed).split())
            logging.getLogger(__name__).warning("MLflow did not take all lines; metrics.jsonl has them: %s", reason)


def _find_or_create(client: Any, experiment: str, output: str, config: Mapping[str, Any]) -> str:
    """The id of the run of this output, running."""
    from mlflow.entities import Param

    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    output_id = derived_id("mlflow", output)
    runs = client.search_runs([experiment_id], f"tags.`{ID_TAG}` = '{output_id}'", max_results=1)
    if runs:
        client.update_run(runs[0].info.run_id, status="RUNNING")
        return runs[0].info.run_id
    run = client.create_run(experiment_id, tags={OUTPUT_TAG: output, ID_TAG: output_id}, run_name=_name_of(output))
    client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in _flattened(config)])
    return run.info.run_id


@contextmanager
def _few_retries() -> Iterator[None]:
    """A wrong address is known in seconds; by default MLflow goes on trying for minutes, as it should later."""
    before = os.environ.get(MLFLOW_RETRIES)
    os.environ[MLFLOW_RETRIES] = "1"
    try:
        yield
    finally:
        os.environ.pop(MLFLOW_RETRIES)
        if before is not None:
            os.environ[MLFLOW_RETRIES] = before


def _name_of(output: str) -> str:
    return output.rstrip("/").rsplit("/", 1)[-1]


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in NOT_LOGGED and value is not None}


def _flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
