"""`train` as a command: two Ray workers, killed and run again, finished and run once more, given what it cannot use."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import ray
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from simda.config import load_config
from simda.data.schema import LATENTS, TEXT_EMBEDDINGS, build_table, caption_id
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.data.video_io import read_all_frames, read_video_metadata
from simda.models.adapter_state import adapter_identity, count_adapter_parameters, read_adapter_header
from simda.models.base_models import autoencoder_identity, text_identity
from simda.models.video_unet import AdapterConfig
from simda.runtime import run_command
from simda.training import notices as notices_module
from simda.training import pretraining
from simda.training.checkpoint import Checkpoints
from simda.training.metrics_log import read_metrics
from simda.training.notices import Notices, StopRequest, WorkerLeavesError, has_begun, told_to_stop
from simda.training.ranks import Ranks
from simda.training.step import AdapterTrainer, native_precision
from simda.training.training_plan import build_trainer, build_validation_objective
from simda.training.worker import train_to_the_end
from tests.pipelines.conftest import load_pipeline
from tests.process_faults import as_soon_as, worker_killed, workers

ROOT = Path(__file__).parents[2]
CAPTIONS = ("a red ball", "a blue box", "")
NUM_STEPS = 12
# Three runs and a restart, of six processes each, before the first test; a guard against hanging, not a measure.
pytestmark = pytest.mark.timeout(600)
TRAINING = "ray::RayTrainWorker"
"""What Ray calls the processes that train."""
SETTINGS = (
    "num_frames=3",
    f"num_steps={NUM_STEPS}",
    "batch_size=4",
    "optimizer.lr=1e-3",
    "optimizer.schedule=cosine",
    "optimizer.ema_decay=0.9",
    "checkpoint_every=2",
    "num_checkpoints_kept=6",
    "log_every=1",
    "num_validation_clips=2",
    "validate_every=4",
)


@pytest.fixture(scope="module")
def train(pipeline) -> ModuleType:
    """The command as a module."""
    return pipeline("train")


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> str:
    """A diffusers directory with the architecture of the embedded base and random weights."""
    torch.manual_seed(0)
    tokenizer = pretraining.build_tokenizer([" ".join(CAPTIONS)])
    pipeline = StableDiffusionPipeline(
        vae=pretraining.build_autoencoder(),
        text_encoder=pretraining.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=pretraining.build_unet(),
        scheduler=pretraining.build_noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(folder)
    return str(folder)


def write_latents(folder: Path, models: dict[str, str], num_clips: int = 10, spoilt: int | None = None) -> str:
    """What `cache_latents` would have written, of random numbers in two buckets; a spoilt clip has one that is none."""
    rng = np.random.default_rng(0)
    shapes = [(4, 4, 8, 8) if number < 0.6 * num_clips else (4, 4, 8, 4) for number in range(num_clips)]
    latents = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]
    if spoilt is not None:
        latents[spoilt][:] = np.nan
    store = OutputStore(str(folder))
    provenance = {part: {"identity": identity} for part, identity in models.items()}
    rows = [
        {
            "clip_id": f"clip-{number}",
            "video_uri": f"{number}.mp4",
            "start_s": 0.0,
            "end_s": 0.5,
            "fps": 8.0,
            "num_frames": 4,
            "height_px": 32,
            "width_px": 4 * shapes[number][3],
            "caption": CAPTIONS[number % 2],
            "decoder": "decord",
            **tensor_columns("latents", latents[number]),
        }
        for number in range(num_clips)
    ]
    embeddings = [
        {
            "caption_id": caption_id(caption),
            "caption": caption,
            **tensor_columns("prompt_embeds", rng.standard_normal((24, 96)).astype(np.float16)),
        }
        for caption in CAPTIONS
    ]
    store.write_shard(LATENTS, build_table(LATENTS, rows, provenance))
    store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, embeddings, provenance))
    store.write_manifest({})
    return str(folder)


@pytest.fixture(scope="module")
def models(base_model: str) -> dict[str, str]:
    return {"vae": autoencoder_identity(base_model), "text_encoder": text_identity(base_model)}


@pytest.fixture(scope="module")
def words(base_model: str, models: dict[str, str], tmp_path_factory) -> tuple[str, ...]:
    """The settings of all runs here, but for the output."""
    latents = write_latents(tmp_path_factory.mktemp("latents"), models)
    return (f"latents={latents}", f"images={{latents: {latents}, share: 0.25}}", f"base_model={base_model}", *SETTINGS)


@pytest.fixture(scope="module")
def finished(words: tuple[str, ...], tmp_path_factory, local_ray, kill, train) -> Path:
    """The output of a run that was disturbed in every way: its driver was killed, its last checkpoint damaged, it was
    run again, and one of its workers was killed.
    """
    output = tmp_path_factory.mktemp("train") / "run"
    prompts = output.parent / "prompts.csv"
    prompts.write_text("prompt,prompt_id\na red ball,ball\na blue box,box\n")
    videos = f"{{prompts: {prompts}, every: 6, num_inference_steps: 2, guidance_scale: 1}}"
    words = (*words, f"validation_videos={videos}")
    latest = output / "checkpoints" / "step-00000004"
    kill("train", (*words, f"output={output}"), (latest / "checkpoint.json").exists)
    assert not (output / "_manifest.json").exists()
    for trainer_state in (output / "checkpoints").glob("step-*/trainer_state.pt"):
        if trainer_state.parent >= latest:
            flip_a_bit(trainer_state)
    told = io.StringIO()
    written = (latest / "checkpoint.json").stat().st_mtime_ns

    def is_written_again() -> bool:
        return (latest / "checkpoint.json").exists() and (latest / "checkpoint.json").stat().st_mtime_ns > written

    with worker_killed(TRAINING, is_written_again, num_workers=2), redirect_stderr(told):
        assert run_command(train.TrainConfig, train.run, train.dry_run, [*words, f"output={output}"]) == 0
    (output.parent / "told.txt").write_text(told.getvalue())
    return output


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def train_in_this_process(
    train: ModuleType, words: tuple[str, ...], world_size: int
) -> tuple[AdapterTrainer, list[float]]:
    """The same run without Ray and without interruption; threads stand in for ranks and average at a barrier."""
    config = load_config(train.TrainConfig, None, [*words, "output=unused"])
    clips = train.open_latents(config)
    barrier, shared, trainers = threading.Barrier(world_size), {}, {}

    def run_rank(rank: int) -> list[float]:
        class ThreadRanks(Ranks):
            def average(self, tensors: Sequence[torch.Tensor]) -> None:
                shared[rank] = [tensor.clone() for tensor in tensors]
                barrier.wait()
                for tensor, *parts in zip(tensors, *shared.values(), strict=True):
                    tensor.copy_(sum(parts) / world_size)
                barrier.wait()

        # Each thread has a number of its own.
        torch.set_num_threads(1)
        trainer = trainers[rank]
        trainer.ranks = ThreadRanks()
        return [trainer.step(clips.batch(step, rank, world_size)).loss for step in range(NUM_STEPS)]

    for rank in range(world_size):
        trainers[rank] = build_trainer(train.make_plan(config, clips), clips, torch.device("cpu"), world_size)
    with ThreadPoolExecutor(world_size) as ranks:
        losses = list(ranks.map(run_rank, range(world_size)))
    return trainers[0], losses[0]


def train_undisturbed(words: tuple[str, ...]) -> tuple[dict[str, np.ndarray], list[float]]:
    """`train_in_this_process` in one of its own: other tests leave marks on theirs that show in the last bit."""
    trainer, losses = train_in_this_process(load_pipeline("train"), words, world_size=2)
    return {name: weight.numpy() for name, weight in trainer.averaged_adapters().items()}, losses


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter.safetensors")


def files_of(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if path.name != "config.yaml"}


@pytest.mark.ray
def test_two_workers_with_all_these_faults_end_as_if_undisturbed_to_the_last_bit(
    finished: Path, words: tuple[str, ...]
):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        expected, losses = process.submit(train_undisturbed, words).result()
    curves = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in curves] == list(range(1, NUM_STEPS + 1))
    assert [row["loss"] for row in curves] == losses
    weights = adapter_of(finished)
    gaps = {name: (weights[name] - torch.from_numpy(weight)).abs() for name, weight in expected.items()}
    assert {name: f"{gap.count_nonzero()}, up to {gap.max():.2g}" for name, gap in gaps.items() if gap.any()} == {}


@pytest.mark.ray
def test_training_starts_from_another_adapter_as_it_is(
    finished: Path, words: tuple[str, ...], train: ModuleType, run, tmp_path: Path
):
    settings = (*words, f"initial_adapter={finished / 'adapter'}", f"output={tmp_path / 'run'}")
    config = load_config(train.TrainConfig, None, settings)
    clips = train.open_latents(config)
    trainer = build_trainer(train.make_plan(config, clips), clips, torch.device("cpu"))
    expected = adapter_of(finished)
    for weights in (trainer.adapters, trainer.averaged_adapters()):
        assert {name: torch.equal(weight, expected[name]) for name, weight in weights.items()} == dict.fromkeys(
            expected, True
        )
    assert train.run_key(config, clips)["initial_adapter"] == adapter_identity(str(finished / "adapter"))
    code, _, err = run("train", *settings, "adapter.frame_positions=true")
    assert (code, "initial_adapter" in err, "leave out one of them" in err) == (2, True, True), err
    code, _, err = run("train", *settings, "initial_adapter=sprites")
    assert (code, "was trained on the base model" in err) == (2, True), err
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
def test_damaged_checkpoints_are_told_and_the_one_before_is_used(finished: Path):
    told = (finished.parent / "told.txt").read_text()
    assert "going on from step-00000002" in told
    assert "step-00000004/trainer_state.pt is damaged" in told


@pytest.mark.ray
def test_two_workers_over_gloo_are_one_process(finished: Path, words: tuple[str, ...], train: ModuleType):
    trainer, losses = train_in_this_process(train, words, world_size=1)
    curves = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    validated = {row["step"]: row["validation_loss"] for row in curves if "validation_loss" in row}
    assert list(validated) == [4, 8, 12]
    config = load_config(train.TrainConfig, None, [*words, "output=unused"])
    clips = train.open_latents(config)
    objective = build_validation_objective(train.make_plan(config, clips), clips)
    assert validated[12] == pytest.approx(trainer.validate(objective, clips.held_out()).loss, rel=1e-4)
    assert [row["loss"] for row in curves] == pytest.approx(losses, rel=1e-5)
    weights = adapter_of(finished)
    for name, weight in trainer.averaged_adapters().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


def terminate_worker() -> None:
    (worker,) = workers(TRAINING)
    worker.terminate()


@pytest.mark.ray
def test_with_room_for_one_of_two_workers_one_does_the_work_of_both(
    finished: Path, words: tuple[str, ...], tmp_path: Path, run, local_ray
):
    """Although the command is terminated, and the worker of the next one."""
    most_of_the_machine = 0.6 * ray.cluster_resources()["CPU"]
    room = (f"workers.cpus_per_worker={most_of_the_machine}", "min_workers=1")
    settings = (*words, f"output={tmp_path / 'run'}", *room, "checkpoint_every=1", "max_worker_failures=1")
    checkpoints = tmp_path / "run" / "checkpoints"
    with as_soon_as(
        (checkpoints / "step-00000001" / "checkpoint.json").exists, lambda: os.kill(os.getpid(), signal.SIGTERM)
    ):
        code, _, err = run("train", *settings)
    assert (code, "stopped; run the same command again to go on" in err) == (1, True), err
    stopped_at = read_metrics(OutputStore(str(tmp_path / "run")))[-1]["step"]
    assert stopped_at < NUM_STEPS
    assert Checkpoints(OutputStore(str(tmp_path / "run"))).find().name == f"step-{stopped_at:08d}"
    with as_soon_as((checkpoints / f"step-{stopped_at + 1:08d}" / "checkpoint.json").exists, terminate_worker):
        code, _, err = run("train", *settings)
    assert code == 0, err
    expected = adapter_of(finished)
    for name, weight in adapter_of(tmp_path / "run").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.ray
def test_a_loss_that_is_not_a_number_stops_at_once_with_the_clip_and_keeps_the_last_checkpoint(
    words: tuple[str, ...], models: dict[str, str], tmp_path: Path, train: ModuleType, run, local_ray
):
    latents = write_latents(tmp_path / "latents", models, spoilt=3)
    output = tmp_path / "run"
    settings = (*words, f"latents={latents}", f"output={output}", "checkpoint_every=1", "num_validation_clips=0")
    settings += ("workers.num_workers=1",)
    clips = train.open_latents(load_config(train.TrainConfig, None, settings))
    batches = [clips.batch(step).clip_ids for step in range(NUM_STEPS)]
    good_steps = next(step for step, names in enumerate(batches) if "clip-3" in names)
    code, _, err = run("train", *settings)
    assert code == 2
    assert f"training diverged at step {good_steps + 1}" in err
    assert "not finite: clip-3." in err
    assert Checkpoints(OutputStore(str(output))).find().name == (f"step-{good_steps:08d}" if good_steps else None)
    assert not (output / "_manifest.json").exists()


@pytest.mark.ray
def test_the_result_says_where_it_comes_from(finished: Path, base_model: str):
    manifest = json.loads((finished / "_manifest.json").read_text())
    assert (manifest["complete"], manifest["num_steps"], manifest["num_clips"]) == (True, NUM_STEPS, 8)
    header = read_adapter_header(str(finished / "adapter"))
    assert header.provenance["num_steps_done"] == NUM_STEPS
    assert header.provenance["config"]["base_model"] == base_model
    assert header.provenance["data"]["num_clips"] == 10
    card = (finished / "adapter" / "README.md").read_text()
    assert f"Adapters of {count_adapter_parameters(str(finished / 'adapter')):,} parameters" in card
    assert f"| step | {NUM_STEPS} |" in card
    assert Image.open(finished / "curves.png").format == "PNG"
    # The run that went on at step 3 wrote one, and so did the one after the worker was killed.
    assert (finished / "tensorboard" / "events.out.tfevents.0000000002.simda").exists()


@pytest.mark.ray
def test_videos_of_fixed_prompts_show_the_adapter_as_it_is_trained(finished: Path):
    folders = sorted((finished / "validation").iterdir())
    assert [folder.name for folder in folders] == ["step-00000006", f"step-{NUM_STEPS:08d}"]
    for folder in folders:
        assert sorted(file.name for file in folder.iterdir()) == ["ball.mp4", "box.mp4", "grid.png"]
        assert read_all_frames(str(folder / "ball.mp4")).shape == (3, 32, 32, 3)
    first, last = (read_video_metadata(str(folder / "ball.mp4"))["num_steps_done"] for folder in folders)
    assert (first, last) == ("6", str(NUM_STEPS))


@pytest.mark.ray
def test_a_finished_run_does_nothing_and_another_one_is_refused(finished: Path, words: tuple[str, ...], run):
    before = files_of(finished)
    code, summary, _ = run("train", *words, f"output={finished}")
    assert (code, summary["already_done"]) == (0, True)
    assert run("train", *words, f"output={finished}", "workers.num_workers=1", "log_every=5")[0] == 0
    code, _, err = run("train", *words, f"output={finished}", "seed=1")
    assert (code, "seed: 0 -> 1" in err) == (2, True)
    assert files_of(finished) == before


def train_steps(
    train: ModuleType, words: tuple[str, ...], num_steps: int, *changes: str
) -> tuple[AdapterTrainer, list[float]]:
    config = load_config(train.TrainConfig, None, [*words, "output=unused", *changes])
    clips = train.open_latents(config)
    trainer = build_trainer(train.make_plan(config, clips), clips, torch.device("cpu"))
    return trainer, [trainer.step(clips.batch(step)).loss for step in range(num_steps)]


@pytest.mark.ray
def test_validation_videos_that_find_no_room_are_refused(words: tuple[str, ...], tmp_path: Path, run, local_ray):
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    all_cpus = f"workers={{num_workers: 1, cpus_per_worker: {int(ray.cluster_resources()['CPU'])}}}"
    videos = f"validation_videos={{prompts: {tmp_path}/prompts.txt, every: 4}}"
    code, _, err = run("train", *words, all_cpus, videos, f"output={tmp_path / 'run'}")
    assert (code, "each and validation videos with 0.5 need more than" in err) == (2, True), err


@pytest.mark.ray
def test_a_lost_actor_is_no_word_of_the_driver_and_stops_nothing(local_ray):
    stop = ray.remote(num_cpus=0)(StopRequest).remote()
    notices = Notices(stop)
    ray.kill(stop)
    for _ in range(3):
        ray.wait([notices._asked], timeout=60)
        assert not notices.stops
    assert not has_begun(stop)


@pytest.mark.ray
def test_the_driver_s_word_reaches_the_workers(local_ray):
    stop = ray.remote(num_cpus=0)(StopRequest).remote()
    assert not has_begun(stop)
    notices = Notices(stop)
    ray.wait([notices._asked], timeout=60)
    assert notices.stops
    assert has_begun(stop)


def test_a_wish_to_stop_that_comes_by_several_signals_is_one(monkeypatch):
    told = threading.Event()
    with told_to_stop(told):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(60)
        monkeypatch.setattr(notices_module, "SAME_WISH_S", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class GivenNotices(Notices):
    """Stands in for `Notices`, which listens to Ray: gives notices after given steps."""

    def __init__(self, **after: int) -> None:
        self.after, self.num_steps = after, 0

    def give(self) -> tuple[bool, ...]:
        self.num_steps += 1
        return tuple(self.after.get(name) == self.num_steps for name in ("stops", "leaves", "looks"))

    def finds_preemption(self) -> bool:
        return True


def test_notice_is_given_a_checkpoint_of_the_step_from_which_another_run_goes_on_as_if_undisturbed(
    words: tuple[str, ...], tmp_path: Path, train: ModuleType
):
    words = (*words, f"output={tmp_path}", "checkpoint_every=100", "num_validation_clips=0", "peak_tflops=1")
    config = load_config(train.TrainConfig, None, words)
    clips, store = train.open_latents(config), OutputStore(str(tmp_path))
    plan = train.make_plan(config, clips)

    def go_on(**after: int) -> None:
        trainer = build_trainer(plan, clips, torch.device("cpu"))
        with Checkpoints(store, 9) as checkpoints:
            if found := checkpoints.find().name:
                trainer.load_state_dict(checkpoints.load(found))
            train_to_the_end(trainer, plan, clips, checkpoints, 0, 1, GivenNotices(**after))

    go_on(looks=1, stops=3)
    assert [row["step"] for row in read_metrics(store)] == [1, 2, 3]
    with pytest.raises(WorkerLeavesError, match="step 5 has a checkpoint"):
        go_on(leaves=2)
    go_on()
    steps = [int(path.name.removeprefix("step-")) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert steps == [1, 3, 5, NUM_STEPS]
    expected = train_steps(train, words, NUM_STEPS)[1]
    assert [row["loss"] for row in read_metrics(store)] == expected
    assert all(0 < row["mfu"] < 1 for row in read_metrics(store))


def weights_of(trainer: AdapterTrainer) -> dict[str, torch.Tensor]:
    """All weights of the video UNet, the frozen ones included."""
    return trainer.denoiser.args[0].state_dict()


def test_two_steps_move_every_adapter_parameter_and_nothing_of_the_base(words: tuple[str, ...], train: ModuleType):
    trained, untrained = train_steps(train, words, 2)[0], train_steps(train, words, 0)[0]
    before = weights_of(untrained)
    moved = {name for name, weight in weights_of(trained).items() if not torch.equal(weight, before[name])}
    assert moved == set(trained.adapters)


def test_ways_to_save_memory_do_not_change_the_training(words: tuple[str, ...], train: ModuleType):
    plain, losses = train_steps(train, words, 2)
    frugal, frugal_losses = train_steps(train, words, 2, "gradient_checkpointing=true", "num_accumulated=2")
    assert frugal_losses == pytest.approx(losses, rel=1e-5)
    for name, weight in plain.averaged_adapters().items():
        torch.testing.assert_close(frugal.averaged_adapters()[name], weight, rtol=1e-3, atol=1e-5)


def test_bf16_halves_the_base_and_keeps_the_adapters(words: tuple[str, ...], train: ModuleType):
    exact_losses = train_steps(train, words, 2)[1]
    trainer, losses = train_steps(train, words, 2, "precision=bf16")
    assert losses == pytest.approx(exact_losses, rel=2e-2)
    dtypes = {name: weight.dtype for name, weight in weights_of(trainer).items()}
    assert {dtypes[name] for name in trainer.adapters} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in trainer.adapters} == {torch.bfloat16}


def test_the_precision_that_auto_comes_to_is_part_of_what_a_run_is(words: tuple[str, ...], train: ModuleType):
    config = train.with_precision(load_config(train.TrainConfig, None, [*words, "output=unused", "precision=auto"]))
    named = load_config(train.TrainConfig, None, [*words, "output=unused", f"precision={native_precision('cpu')}"])
    clips = train.open_latents(config)
    assert config.precision in ("fp32", "bf16")
    assert train.run_key(config, clips) == train.run_key(named, clips)
    assert train.make_plan(config, clips) == train.make_plan(named, clips)


def test_the_papers_preset_undoes_what_a_file_has_of_our_own(train: ModuleType):
    file = str(ROOT / "pipelines/configs/train_sprites.yaml")
    own, papers = (load_config(train.TrainConfig, file, words) for words in ([], ["preset=paper"]))
    assert train.resolve_adapter(papers) == AdapterConfig.of_the_paper()
    assert train.resolve_adapter(own).temporal_kernel == 2 * own.num_frames - 1
    without = load_config(train.TrainConfig, file, ["preset=paper", "adapter.temporal=false"])
    assert train.resolve_adapter(without) == replace(AdapterConfig.of_the_paper(), temporal=False)
    assert (own.timestep_shift, papers.timestep_shift) == (2.0, 1.0)
    assert (papers.num_steps, papers.optimizer) == (own.num_steps, own.optimizer)


def test_dry_run_counts_and_writes_nothing(words: tuple[str, ...], tmp_path: Path, run):
    code, counts, _ = run("train", "--dry-run", *words, f"output={tmp_path / 'run'}")
    assert code == 0
    assert (counts["num_clips"], counts["num_images"], counts["num_epochs"]) == (8, 8, 4.5)
    assert set(counts["clips_per_shape"]) == {"4x3x8x4", "4x3x8x8"}
    assert (counts["clips_per_pass"], counts["goes_on"]) == (2, False)
    # Five taps reach from each of three frames to every other; the paper's kernel has three.
    expected = sum(sites * (2 * width**2 + 7 * width) for width, sites in {32: 3, 96: 3, 128: 4}.items())
    assert counts["num_parameters"] == expected
    code, counts, _ = run("train", "--dry-run", *words, f"output={tmp_path / 'run'}", "adapter.temporal_kernel=3")
    assert counts["num_parameters"] == expected - sum(sites * width for width, sites in {32: 3, 96: 3, 128: 4}.items())
    assert counts["seconds_left"] is None
    assert not list(tmp_path.iterdir())
    code, counts, _ = run("train", "--dry-run", *words, f"output={tmp_path / 'run'}", "expected_clips_per_s=0.5")
    assert (code, counts["seconds_left"]) == (0, counts["num_steps"] * 4 / 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimiser.lr=1e-4", "unknown setting; did you mean optimizer.lr?"),
        ("optimizer={schedule: constant, num_warmup_steps: 9}", "schedule=constant has no warm-up"),
        ("batch_size=3", "batch_size=3 cannot be shared equally by workers.num_workers=2"),
        ("min_workers=3", "min_workers=3 is above workers.num_workers=2"),
        ("workers={num_workers: 3}", "num_workers=3 with num_accumulated=1; use a multiple of 3"),
        ("num_frames=5", "num_frames=5, but all 10 clips"),
        ("precision=fp16", "precision=fp16 is for GPUs"),
        ("workers={num_workers: 2, gpus_per_worker: 0.5}", "workers that share a GPU cannot train together"),
        ("adapter={temporal_kernel: 4}", "temporal_kernel=4; it is odd"),
        ("adapter={stretch_from: 4}", "stretch_from=4 has no effect without temporal_kernel"),
        ("adapter={attention: false, ffn: false, temporal: false}", "nothing would be trained"),
        ("adapter={temporal: false, frame_positions: true}", "frame_positions: no effect without the adapters"),
        ("adapter={attention: false, ffn: false, spatial_reduction: 2}", "spatial_reduction: no effect"),
        ("adapter={spatial_reduction: 1000}", "1000"),
        ("images={share: 0.5}", "share=0.5 has no effect without images.latents"),
        ("images.latents=/nowhere", "latents=/nowhere does not exist"),
        ("latents=/nowhere", "latents=/nowhere does not exist"),
        ("base_model=/nowhere", "base_model=/nowhere"),
        ("push_to_hub=mine", "push_to_hub='mine' has no owner"),
        ("validation_videos={prompts: /nowhere.csv, every: 4}", "/nowhere.csv"),
        ("validation_videos={prompts: /nowhere.csv, every: 5}", "every=5 is no multiple of checkpoint_every=2"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    change: str, message: str, words: tuple[str, ...], tmp_path: Path, run
):
    code, _, err = run("train", *words, f"output={tmp_path / 'run'}", change)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "run").exists()


def test_latents_of_another_autoencoder_are_refused_with_both_identities(
    words: tuple[str, ...], models: dict[str, str], tmp_path: Path, run
):
    latents = write_latents(tmp_path / "latents", {**models, "vae": "0123456789abcdef"})
    code, _, err = run("train", *words, f"latents={latents}", f"output={tmp_path / 'run'}")
    assert code == 2
    assert '"0123456789abcdef"' in err
    assert models["vae"] in err


def test_an_empty_table_is_refused(words: tuple[str, ...], models: dict[str, str], tmp_path: Path, run):
    latents = write_latents(tmp_path / "latents", models, num_clips=0)
    code, _, err = run("train", *words, f"latents={latents}", f"output={tmp_path / 'run'}")
    assert (code, "has no rows" in err) == (2, True), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
@pytest.mark.ray
def test_more_than_the_machine_has_is_refused(words: tuple[str, ...], tmp_path: Path, run, local_ray):
    code, _, err = run("train", *words, f"output={tmp_path / 'run'}", "workers.gpus_per_worker=1")
    assert (code, "with GPUs 1 each" in err) == (2, True), err
