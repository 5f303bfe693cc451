"""Sampling clips: a row's clip is its own, every output and scheduler works, and faults are told before any work."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from simda.errors import ConfigError, ModelMismatchError
from simda.generation.text_to_video import TextToVideoPipeline
from simda.models.adapter_state import save_adapter
from simda.models.autoencoder import decode_latents
from simda.models.text_encoder import encode_prompts
from simda.models.video_unet import AdapterConfig, adapter_parameters, inject_adapters, predict

PROMPTS = ["a red ball", "a blue box", "a ball"]
SETTINGS = {"num_frames": 3, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def loaded(base_model, adapter) -> TextToVideoPipeline:
    pipeline = TextToVideoPipeline.from_pretrained(base_model, adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded) -> TextToVideoPipeline:
    """With its own scheduler, for tests that change it."""
    return TextToVideoPipeline(**{**loaded.components, "scheduler": type(loaded.scheduler)(**loaded.scheduler.config)})


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_the_guided_prediction_of_the_network(loaded):
    """The first of two DDIM steps by hand: a draw, two texts, guidance, the scheduler's equation."""
    after = []
    loaded(
        PROMPTS[0],
        **SETTINGS,
        guidance_scale=4,
        negative_prompt="box",
        generator=generators(5),
        callback_on_step_end=lambda _pipeline, _step, _timestep, tensors: after.append(tensors["latents"]),
    )
    noise = torch.randn(1, 4, 3, 8, 8, generator=generators(5)[0])
    timestep, next_timestep = loaded.scheduler.timesteps
    without, with_text = (
        predict(loaded.unet, noise, timestep[None], encode_prompts(loaded.tokenizer, loaded.text_encoder, [text]))
        for text in ("box", PROMPTS[0])
    )
    predicted = without + 4 * (with_text - without)
    assert (predicted - with_text).abs().max() > 1e-2
    signal, next_signal = loaded.scheduler.alphas_cumprod[timestep], loaded.scheduler.alphas_cumprod[next_timestep]
    clean = (noise - (1 - signal) ** 0.5 * predicted) / signal**0.5
    assert_same(after[0], next_signal**0.5 * clean + (1 - next_signal) ** 0.5 * predicted)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_row_is_the_same_alone_in_a_batch_and_in_another_order(loaded, eta):
    batch = loaded(PROMPTS, **SETTINGS, eta=eta, generator=generators(0, 1, 2)).frames
    turned = loaded(PROMPTS[::-1], **SETTINGS, eta=eta, generator=generators(2, 1, 0)).frames
    assert_same(turned, batch.flip(0))
    for row, prompt in enumerate(PROMPTS):
        assert_same(loaded(prompt, **SETTINGS, eta=eta, generator=generators(row)).frames, batch[row : row + 1])
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_prompt_seed_guidance_negative_prompt_and_eta_decide_the_clip(loaded):
    def clip(prompt=PROMPTS[0], seed=0, **changes) -> Tensor:
        return loaded(prompt, **{**SETTINGS, "guidance_scale": 8, **changes}, generator=generators(seed)).frames

    first = clip()
    assert torch.equal(clip(), first)
    assert torch.equal(clip(negative_prompt=""), first)
    changed = (
        clip(prompt=PROMPTS[1]),
        clip(seed=1),
        clip(guidance_scale=3),
        clip(negative_prompt="a box"),
        clip(eta=1.0),
    )
    for other in changed:
        assert (other - first).abs().max() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_frames_start_with_the_asked_share_of_noise_in_common(pipeline, share):
    starts = []

    def keep(*told):
        starts.append(told[-1]["latents"])

    # Of a network that predicts nothing, the first step only scales the noise.
    pipeline.unet.forward = lambda sample, *args, **kwargs: SimpleNamespace(sample=torch.zeros_like(sample))
    try:
        settings = {**SETTINGS, "num_frames": 2, "height": 64, "width": 64, "guidance_scale": 1.0}
        pipeline(
            PROMPTS[:2], **settings, noise_correlation=share, generator=generators(0, 1), callback_on_step_end=keep
        )
    finally:
        del pipeline.unet.forward
    first, second = starts[0].unbind(dim=2)
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert float(correlation) == pytest.approx(share, abs=0.03)
    assert float(first.std() / second.std()) == pytest.approx(1, abs=0.03)
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0])
def test_without_guidance_the_network_sees_each_clip_once(loaded, guidance_scale):
    batch_sizes = []
    hook = loaded.unet.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
    try:
        plain = loaded(PROMPTS[0], **SETTINGS, guidance_scale=guidance_scale, generator=generators(0)).frames
        loaded(PROMPTS[0], **SETTINGS, guidance_scale=1.01, generator=generators(0))
    finally:
        hook.remove()
    assert batch_sizes == [3, 3, 6, 6]
    assert torch.isfinite(plain).all()


def test_every_output_type_is_the_same_clip(loaded):
    def clip(output_type: str):
        settings = {**SETTINGS, "output_type": output_type, "height": 16, "width": 12}
        return loaded(PROMPTS[:2], **settings, generator=generators(0, 1)).frames

    latents, frames, tensor, images = (clip(kind) for kind in ("latent", "np", "pt", "pil"))
    assert latents.shape == (2, 4, 3, 8, 6)
    assert (frames.shape, frames.dtype) == ((2, 3, 16, 12, 3), np.float32)
    assert frames.min() >= 0
    assert frames.max() <= 1
    assert frames.std() > 0.01
    assert_same(torch.from_numpy(frames), decode_latents(loaded.vae, latents))
    assert_same(tensor, torch.from_numpy(frames).permute(0, 1, 4, 2, 3))
    assert [[type(image) for image in clip] for clip in images] == [[PIL.Image.Image] * 3] * 2
    assert np.abs(np.array(images[1][2]) / 255 - frames[1, 2]).max() <= 0.5 / 255 + 1e-4


def test_defaults_are_those_of_the_base_and_tuples_are_given_on_request(loaded):
    (frames,) = loaded(PROMPTS[0], num_frames=1, num_inference_steps=1, return_dict=False)
    assert frames.shape == (1, 1, 16, 16, 3)


def test_given_latents_stand_in_for_the_draw(loaded):
    noise = torch.randn(1, 4, 3, 8, 8, generator=generators(0)[0])
    given = loaded(PROMPTS[0], **SETTINGS, latents=noise, generator=generators(9)).frames
    assert torch.equal(given, loaded(PROMPTS[0], **SETTINGS, generator=generators(0)).frames)


def test_the_callback_sees_every_step_and_can_change_latents(loaded):
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((pipeline is loaded, step, timestep, tensors["latents"].shape))

    untouched = loaded(PROMPTS[0], **SETTINGS, generator=generators(0), callback_on_step_end=look).frames
    shape = (1, 4, 3, 8, 8)
    assert seen == [(True, step, int(loaded.scheduler.timesteps[step]), shape) for step in range(2)]
    assert torch.equal(untouched, loaded(PROMPTS[0], **SETTINGS, generator=generators(0)).frames)

    def blank(pipeline, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    blanked = loaded(PROMPTS[0], **SETTINGS, generator=generators(0), callback_on_step_end=blank).frames
    assert torch.equal(blanked, torch.zeros(shape))


@pytest.mark.parametrize(
    ("scheduler", "similarity"), [(DPMSolverMultistepScheduler, 0.999), (EulerDiscreteScheduler, 0.99999)]
)
def test_diffusers_schedulers_come_near_to_ddim(pipeline, scheduler, similarity):
    """Euler's step is DDIM's in other variables, the solver is of higher order; a second run is that of the first."""
    settings = {**SETTINGS, "num_inference_steps": 12, "guidance_scale": 1.0}
    ddim = pipeline(PROMPTS[:1], **settings, generator=generators(0)).frames
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    clips = [pipeline(PROMPTS[:1], **settings, generator=generators(0)).frames for _ in range(2)]
    assert torch.equal(clips[0], clips[1])
    assert torch.nn.functional.cosine_similarity(clips[0].flatten(), ddim.flatten(), dim=0) > similarity


def test_guidance_in_an_interval_of_the_steps_saves_passes(loaded):
    """The first half with guidance, so that it is that of the whole run; then without, at half the price."""

    def latents_of(**settings) -> tuple[list[Tensor], list[int]]:
        after, batch_sizes = [], []
        hook = loaded.unet.register_forward_pre_hook(lambda _, inputs: batch_sizes.append(len(inputs[0])))
        keep = lambda _pipeline, _step, _timestep, tensors: after.append(tensors["latents"])  # noqa: E731
        try:
            loaded(PROMPTS[:2], **settings, generator=generators(0, 1), callback_on_step_end=keep)
        finally:
            hook.remove()
        return after, batch_sizes

    steps = {**SETTINGS, "num_inference_steps": 4, "guidance_scale": 9.0}
    whole, half = latents_of(**steps), latents_of(**steps, guidance_interval=(0.0, 0.5))
    plain = latents_of(**{**steps, "guidance_scale": 1.0})
    assert half[1] == [12, 12, 6, 6]
    assert whole[1] == [12] * 4
    for step in range(2):
        assert torch.equal(half[0][step], whole[0][step])
    assert (half[0][3] - whole[0][3]).abs().max() > 1e-3
    late = latents_of(**steps, guidance_interval=(0.5, 1.0))
    assert late[1] == [6, 6, 12, 12]
    assert_same(late[0][1], plain[0][1])


def test_texts_that_are_encoded_already(loaded):
    settings = {**SETTINGS, "guidance_scale": 4.0}
    embeds, negative = loaded.encode_prompts(PROMPTS[:2]), loaded.encode_prompts(["box", "box"])
    given = loaded(prompt_embeds=embeds, negative_prompt_embeds=negative, **settings, generator=generators(0, 1)).frames
    assert torch.equal(given, loaded(PROMPTS[:2], negative_prompt="box", **settings, generator=generators(0, 1)).frames)


def test_every_distinct_prompt_is_encoded_once_and_alone(loaded):
    batch_sizes = []
    hook = loaded.text_encoder.register_forward_pre_hook(
        lambda _, inputs, named: batch_sizes.append(len(named.get("input_ids", inputs and inputs[0]))), with_kwargs=True
    )
    try:
        loaded([*PROMPTS, *PROMPTS], **SETTINGS, generator=generators(*range(6)))
    finally:
        hook.remove()
    assert batch_sizes == [1] * 4
    assert torch.equal(loaded.encode_prompts(PROMPTS)[1], loaded.encode_prompts(PROMPTS[1:2])[0])


def test_without_an_adapter_frames_are_independent_images(base_model):
    plain = TextToVideoPipeline.from_pretrained(base_model)
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 3, 8, 8, generator=generators(0)[0])
    clip = plain(PROMPTS[0], **SETTINGS, latents=noise).frames
    settings = {**SETTINGS, "num_frames": 1}
    for frame in range(3):
        one = slice(frame, frame + 1)
        assert_same(plain(PROMPTS[0], **settings, latents=noise[:, :, one]).frames, clip[:, :, one])


def test_an_adapter_of_another_base_is_refused(base_model, make_unet, tmp_path):
    unet = inject_adapters(make_unet())
    save_adapter(adapter_parameters(unet), AdapterConfig(), "another", {}, str(tmp_path))
    with pytest.raises(ModelMismatchError, match="trained on the base model another"):
        TextToVideoPipeline.from_pretrained(base_model, str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "no prompt"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"height": 15}, "frames of 16x15 pixels"),
        ({"height": 0}, "frames of 16x0 pixels"),
        ({"width": -2}, "frames of -2x16 pixels"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"generator": generators(0)}, "1 generators for 2 prompts"),
        ({"output_type": "mp4"}, "output_type='mp4'"),
        ({"guidance_rescale": 2}, "guidance_rescale=2; it is a share"),
        ({"guidance_interval": (0.5, 0.5)}, r"guidance_start=0.5, guidance_end=0.5; .* 0 <= start < end <= 1"),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.7}, r"have no effect at guidance_scale=1.0"),
        ({"window_overlap": 2}, "window_frames=0, window_overlap=2"),
        ({"window_frames": 2, "window_overlap": 2}, "overlap by less than they are long"),
        ({"prompt_embeds": torch.zeros(2, 5, 96)}, "give either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 5, 96)}, "negative_prompt_embeds of shape None"),
        ({"negative_prompt_embeds": torch.zeros(2, 5, 96)}, "give both or none"),
        ({"noise_correlation": 1.5}, "noise_correlation=1.5; it is a share, from 0 to 1"),
        (
            {"noise_correlation": 0.5, "latents": torch.zeros(2, 4, 3, 8, 8)},
            "noise_correlation=0.5 has no effect on latents that are given",
        ),
        (
            {"latents": torch.zeros(2, 4, 5, 8, 8)},
            r"latents of shape \(2, 4, 5, 8, 8\); these settings need \(2, 4, 3,",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused_before_any_work(loaded, no_work, changes, message):
    with pytest.raises(ConfigError, match=message):
        loaded(**{"prompt": PROMPTS[:2], **SETTINGS, **changes})


def test_eta_is_refused_by_a_scheduler_without_it(pipeline, no_work):
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ConfigError, match=r"eta=0\.5: EulerDiscreteScheduler does not know it"):
        pipeline(PROMPTS[:2], **SETTINGS, eta=0.5)


@pytest.fixture
def no_work(loaded, monkeypatch) -> Callable[..., None]:
    def work(*_, **__) -> None:
        raise AssertionError("a model was called")

    for model in (loaded.text_encoder, loaded.unet, loaded.vae):
        monkeypatch.setattr(model, "forward", work)
    return work


def test_an_unknown_argument_of_from_pretrained_is_not_dropped(base_model):
    with pytest.raises(TypeError, match="variant"):
        TextToVideoPipeline.from_pretrained(base_model, variant="fp16")
