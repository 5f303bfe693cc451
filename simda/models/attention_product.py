"""The product of queries, keys and values that every attention of this package comes down to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attend(
    q: Float[Tensor, "b a n d"], k: Float[Tensor, "b a m d"], v: Float[Tensor, "b a m d"]
) -> Float[Tensor, "b a n d"]:
    """softmax(q k^T / sqrt(d)) v, by torch's fused kernel for the device.

    In bfloat16 on a CPU it is written out as plain products: there they are 1.5 to 3 times as fast as the fused kernel,
    most of all backwards. The weights of a row are summed in float32 either way, and kept in bfloat16.
    """
    if q.device.type != "cpu" or _compute_dtype(q) != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    # Autocast would take float32 here: three times as slow with what is saved for the way back, and no more exact.
    with torch.autocast("cpu", enabled=False):
        weights = scores.softmax(dim=-1)
    return torch.matmul(weights, v)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """What products of this tensor are computed in, autocast considered."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
