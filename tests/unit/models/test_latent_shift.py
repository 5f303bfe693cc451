"""Latent-Shift Attention against literal loops over frames and tokens, and its reach by perturbation."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from simda.models.latent_shift import latent_shift_attention, shift_index, shift_tokens

# From the paper's authors' code; written out here, so that a change of the module's table is noticed.
TABLE = [[4, 3, 2, 1], [3, 2, 1, 0], [2, 1, 0, 0], [1, 2, 3, 4]]
SIZES = [(6, 4, 4), (6, 5, 3), (3, 2, 7), (1, 4, 4), (2, 1, 1), (9, 8, 6)]
HEADS = 2
WIDTH = 8


@pytest.fixture
def attention() -> Attention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Attention(query_dim=WIDTH, heads=HEADS, dim_head=WIDTH // HEADS).eval().requires_grad_(False)


def random_tokens(num_clips: int, num_frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_clips * num_frames, height * width, WIDTH, generator=generator)


def source_frame(frame: int, row: int, column: int) -> int:
    back = TABLE[row % 4][column % 4]
    return frame - back if frame >= back else frame


def slow_shift(clip: Tensor, height: int, width: int) -> Tensor:
    """z_shift of one clip [f, n, d], token by token."""
    shifted = torch.empty_like(clip)
    for frame in range(len(clip)):
        for row in range(height):
            for column in range(width):
                token = row * width + column
                shifted[frame, token] = clip[source_frame(frame, row, column), token]
    return shifted


def slow_attention(attention: Attention, clip: Tensor, height: int, width: int, keys_values: str) -> Tensor:
    """One clip [f, n, d]; tokens are concatenated before they are projected, as the paper writes it; head by head."""
    shifted = slow_shift(clip, height, width)
    outputs = []
    for frame in range(len(clip)):
        former = max(frame - 1, 0)
        context = {
            "paper": torch.cat([clip[frame], shifted[frame]]),
            "released": torch.cat([shifted[former], shifted[frame]]),
            "full": clip.flatten(0, 1),
            "sparse_causal": torch.cat([clip[0], clip[former]]),
        }[keys_values]
        queries, keys, values = attention.to_q(clip[frame]), attention.to_k(context), attention.to_v(context)
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            scores = queries[:, part] @ keys[:, part].T / (WIDTH // HEADS) ** 0.5
            heads.append(scores.softmax(dim=1) @ values[:, part])
        outputs.append(attention.to_out[0](torch.cat(heads, dim=1)))
    return torch.stack(outputs)


@pytest.mark.parametrize(("num_frames", "height", "width"), SIZES)
def test_index_names_the_token_of_the_slow_loop(num_frames, height, width):
    expected = [
        source_frame(frame, row, column) * height * width + row * width + column
        for frame in range(num_frames)
        for row in range(height)
        for column in range(width)
    ]
    assert shift_index(num_frames, height, width, torch.device("cpu")).tolist() == expected


def test_shift_keeps_clips_apart():
    tokens = random_tokens(2, 6, 5, 3)
    expected = torch.cat([slow_shift(clip, 5, 3) for clip in tokens.split(6)])
    assert torch.equal(shift_tokens(tokens, 6, 5, 3), expected)


@pytest.mark.parametrize("keys_values", ["paper", "released", "full", "sparse_causal"])
@pytest.mark.parametrize(("num_frames", "height", "width"), SIZES)
def test_attention_is_that_of_the_equations(attention, keys_values, num_frames, height, width):
    tokens = random_tokens(2, num_frames, height, width)
    expected = [slow_attention(attention, clip, height, width, keys_values) for clip in tokens.split(num_frames)]
    actual = latent_shift_attention(attention, tokens, num_frames, height, width, keys_values)
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_off_is_the_stock_attention(attention):
    tokens = random_tokens(2, 3, 4, 5)
    torch.testing.assert_close(latent_shift_attention(attention, tokens, 3, 4, 5, "off"), attention(tokens))


def test_first_frame_and_single_frames_are_plain_self_attention(attention):
    tokens = random_tokens(1, 6, 4, 4)
    plain = attention(tokens)
    clip = latent_shift_attention(attention, tokens, 6, 4, 4, "paper")
    torch.testing.assert_close(clip[0], plain[0])
    assert (clip[1] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(latent_shift_attention(attention, tokens, 1, 4, 4, "paper"), plain)


@pytest.mark.parametrize("frame", [0, 2, 5])
def test_a_frame_reaches_itself_and_at_most_four_later_ones(attention, frame):
    tokens = random_tokens(1, 8, 5, 6)
    before = latent_shift_attention(attention, tokens, 8, 5, 6, "paper")
    tokens[frame] += 1
    after = latent_shift_attention(attention, tokens, 8, 5, 6, "paper")
    changed = [number for number in range(8) if not torch.equal(before[number], after[number])]
    assert changed == [number for number in range(8) if frame <= number <= frame + 4]


@pytest.mark.parametrize(("row", "column"), [(row, column) for row in range(4) for column in range(4)])
def test_a_token_reaches_just_the_frame_that_the_table_says(attention, row, column):
    tokens = random_tokens(1, 8, 4, 4)
    before = latent_shift_attention(attention, tokens, 8, 4, 4, "paper")
    tokens[2, row * 4 + column] += 1
    after = latent_shift_attention(attention, tokens, 8, 4, 4, "paper")
    changed = {number for number in range(8) if not torch.equal(before[number], after[number])}
    assert changed == {2, 2 + TABLE[row][column]}


def test_an_index_made_for_inference_serves_a_later_training_step(attention):
    shift_index.cache_clear()
    tokens = random_tokens(1, 3, 4, 4)
    with torch.inference_mode():
        latent_shift_attention(attention, tokens, 3, 4, 4, "paper")
    tokens.requires_grad_(True)
    latent_shift_attention(attention, tokens, 3, 4, 4, "paper").sum().backward()
    assert tokens.grad.abs().max() > 0
