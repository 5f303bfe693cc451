"""What the ranks of a run tell each other; with one process and no process group, nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks of torch's default process group, as one of them sees it."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean.

        The adapters' gradients are few, so one flat all-reduce after the last backward pass does what
        DistributedDataParallel would do, with a summing order that does not depend on when the process was started.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, names: Sequence[str]) -> list[str]:
        """The names of all ranks, in the order of the ranks."""
        if not dist.is_initialized():
            return list(names)
        parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, list(names))
        return [name for part in parts for name in part]
