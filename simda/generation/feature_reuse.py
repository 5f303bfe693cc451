"""Fewer full passes: between them, the inner blocks of a UNet give again what they gave last.

What the inner blocks see of a clip, coarse and deep in the network, changes little from one sampling step to the next;
the outermost blocks, which are computed in every step, carry what does. The sampler is `text_to_video.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from simda.errors import ConfigError

HOOK = "feature_reuse"
Network = Callable[..., Tensor]


@dataclass
class FeatureReuse:
    """The features of the last full pass, and whether they stand for a new one.

    Attributes:
        interval: every how many steps all blocks are computed; 1 in each.

    Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free", arXiv 2312.00858, with the branch after the
    first block.
    """

    interval: int = 1
    _features: dict[tuple[Hashable, int, nn.Module], Any] = field(default_factory=dict)
    _call: tuple[Hashable, int] = (None, 0)
    _is_full: bool = True

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"reuse_interval={self.interval}; it starts at 1, a full pass in every step")

    @contextmanager
    def on(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """While open, the inner blocks of `unet` are computed as `in_step` says.

        Raises:
            ConfigError: the network has a single block, and so none inside.
        """
        inner = inner_blocks(unet)
        if self.interval > 1 and not inner:
            raise ConfigError(
                f"reuse_interval={self.interval}: this UNet has a single block, whose features cannot be reused; use 1"
            )
        inner = inner if self.interval > 1 else []
        for block in inner:
            HookRegistry.check_if_exists_or_initialize(block).register_hook(_Reuse(self, block), HOOK)
        try:
            yield
        finally:
            for block in inner:
                HookRegistry.check_if_exists_or_initialize(block).remove_hook(HOOK)
            self._features.clear()

    def in_step(self, network: Network, step: int, kind: Hashable) -> Network:
        """`network` for the calls of one sampling step, which come in the same order and number in every step.

        Args:
            kind: whether the step is guided, or whatever else changes what the calls stand for; a full pass follows on
                a change.
        """
        num_calls = 0

        def called(*args: Any) -> Tensor:
            nonlocal num_calls
            self._call, num_calls = (kind, num_calls), num_calls + 1
            self._is_full = step % self.interval == 0
            return network(*args)

        stale = [key for key in self._features if key[0] != kind]
        for key in stale:
            del self._features[key]
        return called

    def features(self, block: nn.Module, compute: Callable[[], Any]) -> Any:
        """What a block gives in the present call."""
        key = (*self._call, block)
        if self._is_full or key not in self._features:
            self._features[key] = compute()
        return self._features[key]


def inner_blocks(unet: UNet2DConditionModel) -> list[nn.Module]:
    """All blocks but the first and the last."""
    if len(unet.down_blocks) < 2:
        return []
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [*unet.down_blocks[1:], *middle, *unet.up_blocks[:-1]]


class _Reuse(ModelHook):
    """Takes the place of a block's forward."""

    def __init__(self, reuse: FeatureReuse, block: nn.Module) -> None:
        super().__init__()
        self._reuse, self._block = reuse, block

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """diffusers' name for it."""
        return self._reuse.features(self._block, lambda: self.fn_ref.original_forward(*args, **kwargs))
