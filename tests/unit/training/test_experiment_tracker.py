"""The curves on Weights & Biases and MLflow: refused without their extra; continued by the next run of an output."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from simda.errors import ConfigError
from simda.training.experiment_tracker import check_mlflow, check_wandb, mlflow_run, wandb_run

HAS_WANDB, HAS_MLFLOW = (importlib.util.find_spec(name) is not None for name in ("wandb", "mlflow"))
needs_wandb = pytest.mark.skipif(not HAS_WANDB, reason="the extra wandb is not installed")
needs_mlflow = pytest.mark.skipif(not HAS_MLFLOW, reason="the extra mlflow is not installed")
LINE = {"step": 1, "loss": 1.5, "grad_norm": None, "seconds": 3.0}


def test_what_is_not_asked_for_tracks_nothing(tmp_path: Path):
    check_wandb(None)
    check_mlflow(None, None)
    out = str(tmp_path)
    with wandb_run(None, "online", out, {}) as to_wandb, mlflow_run(None, None, out, {}) as to_mlflow:
        to_wandb(LINE)
        to_mlflow(LINE)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(HAS_WANDB, reason="the extra is installed")
def test_without_wandb_it_is_told_what_to_install():
    with pytest.raises(ConfigError, match=r"wandb.project=mine: .* is not installed; run `pip install .*\[wandb\]'"):
        check_wandb("mine")


@pytest.mark.skipif(HAS_MLFLOW, reason="the extra is installed")
def test_without_mlflow_it_is_told_what_to_install():
    with pytest.raises(ConfigError, match=r"mlflow.experiment=mine: .* not installed; run `pip install .*\[mlflow\]'"):
        check_mlflow("mine", None)


@needs_wandb
def test_offline_a_run_leaves_its_lines_and_the_next_one_has_the_same_id(tmp_path: Path):
    check_wandb("mine")
    for step in (1, 2):
        with wandb_run("mine", "offline", str(tmp_path), {"num_steps": 2}) as track:
            track(LINE | {"step": step})
    runs = sorted((tmp_path / "wandb").glob("**/offline-run-*/*.wandb"))
    assert len({file.name for file in runs}) == 1
    assert all(b"loss" in file.read_bytes() for file in runs)


@needs_wandb
def test_without_a_login_a_run_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with (
        pytest.raises(ConfigError, match=r"wandb.project=mine: .*log in, or use wandb.mode=offline"),
        wandb_run("mine", "online", str(tmp_path), {}),
    ):
        pass


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """MLflow's own store in a folder, which needs no server."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file:{tmp_path}/store"


@needs_mlflow
def test_a_run_of_one_output_is_continued_on_mlflow_and_others_are_not(mlflow_store: str):
    from mlflow import MlflowClient

    settings = {"num_steps": 2, "optimizer": {"lr": 1e-4}}
    for output, step in (("s3://x/o'ne", 1), ("s3://x/o'ne", 2), ("s3://x/two", 1)):
        # What may differ when a run goes on is no reason to refuse it.
        with mlflow_run("mine", mlflow_store, output, settings | {"log_every": step}) as track:
            track(LINE | {"step": step})
    client = MlflowClient(mlflow_store)
    runs = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    found = {
        run.info.run_name: (
            [(line.step, line.value) for line in client.get_metric_history(run.info.run_id, "loss")],
            run.info.status,
            run.data.params["optimizer.lr"],
            set(run.data.metrics),
        )
        for run in runs
    }
    assert len(runs) == 2
    assert found["o'ne"] == ([(1, 1.5), (2, 1.5)], "FINISHED", "0.0001", {"loss"})
    assert found["two"][0] == [(1, 1.5)]


@needs_mlflow
def test_a_run_that_fails_is_told_as_failed_and_keeps_its_lines(mlflow_store: str):
    from mlflow import MlflowClient

    def stopped_run() -> None:
        with mlflow_run("mine", mlflow_store, "/out", {}) as track:
            track(LINE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_run()
    client = MlflowClient(mlflow_store)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.status, run.data.metrics) == ("FAILED", {"loss": 1.5})


@needs_mlflow
def test_a_server_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"set mlflow.tracking_uri or MLFLOW_TRACKING_URI"):
        check_mlflow("mine", None)
    nowhere = "http://127.0.0.1:9"
    check_mlflow("mine", nowhere)
    with (
        pytest.raises(ConfigError, match=r"mlflow.experiment=mine: .*check mlflow.tracking_uri"),
        mlflow_run("mine", nowhere, "/out", {}),
    ):
        pass
