"""The product behind every attention gives what torch's own gives, in every precision and with gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from simda.models.attention_product import attend
from simda.models.text_attention import AttendProcessor


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_exact_attention(dtype: torch.dtype, tolerance: float) -> None:
    given = inputs(dtype)
    exact = [part.detach().double().requires_grad_() for part in given]
    expected = F.scaled_dot_product_attention(*exact)
    found = attend(*given)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.double).reshape(expected.shape)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for part, truth in zip(given, exact, strict=True):
        torch.testing.assert_close(part.grad.double(), truth.grad, atol=2 * tolerance, rtol=tolerance)


def test_autocast_decides_the_precision_of_float32_inputs() -> None:
    given = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*given)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), attend(*given), atol=2e-2, rtol=2e-2)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (1e3 * part.detach() for part in inputs(torch.bfloat16))
    assert attend(q, k, v).isfinite().all()


@pytest.mark.parametrize("context_width", [None, 6])
def test_the_processor_is_the_stock_one(context_width: int | None) -> None:
    torch.manual_seed(0)
    attention = Attention(12, cross_attention_dim=context_width, heads=3, dim_head=4)
    tokens = torch.randn(2, 5, 12)
    context = None if context_width is None else torch.randn(2, 7, context_width)
    expected = attention(tokens, encoder_hidden_states=context)
    attention.set_processor(AttendProcessor())
    torch.testing.assert_close(attention(tokens, encoder_hidden_states=context), expected)
