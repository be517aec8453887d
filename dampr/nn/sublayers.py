"""The forward of torch's transformer layers in Python, sublayer by sublayer; plain and gated layers share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class BySublayers(nn.Module):
    """Mixin before ``nn.TransformerEncoderLayer`` or ``nn.TransformerDecoderLayer`` that runs their sublayers one by
    one.

    torch's own ``forward`` has a fused path that reads the weights of all parts without calling them, so gates in the
    parts would be ignored.
    """

    norm_first: bool
    activation: Any
    linear1: Any
    linear2: Any
    _attentions: tuple[str, ...]

    @property
    def _sublayers(self) -> tuple[str, ...]:
        """The name of the first module of each sublayer, in order: the attentions, then "linear1"."""
        return (*self._attentions, "linear1")

    def _sum(self, index: int, x: Tensor, branch: Callable[[], Tensor]) -> Tensor:
        """x + branch(), where subclasses may gate the branch, or leave it out. ``index`` is the number of the
        sublayer.
        """
        raise NotImplementedError

    def _sublayer(self, index: int, norm: Any, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """One sublayer with its norm, before the branch (``norm_first``) or after the sum."""
        if self.norm_first:
            return self._sum(index, x, lambda: branch(norm(x)))
        out: Tensor = norm(self._sum(index, x, lambda: branch(x)))
        return out


class EncoderBySublayers(BySublayers, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer``, sublayer by sublayer."""

    _attentions = ("self_attn",)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return self._on_padded(src, src_mask, src_key_padding_mask)
        x = self._sublayer(0, self.norm1, src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal))
        return self._sublayer(1, self.norm2, x, self._ff_block)

    def _on_padded(self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None) -> Tensor:
        """The forward for a nested tensor: pad it, run, and make the result nested again.

        ``nn.TransformerEncoder`` makes nested tensors of padded batches for the fused path.
        """
        if src_mask is not None or src_key_padding_mask is not None:
            raise TypeError(
                "src: got a nested tensor and a mask, expected a padded tensor with masks or a nested one without"
            )
        lengths = [len(t) for t in src.unbind()]
        x = src.to_padded_tensor(0.0)
        padding = torch.arange(x.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device).unsqueeze(1)
        y = self.forward(x, src_key_padding_mask=padding)
        return torch.nested.as_nested_tensor([t[:n] for t, n in zip(y, lengths, strict=True)], layout=src.layout)


class DecoderBySublayers(BySublayers, nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``, sublayer by sublayer."""

    _attentions = ("self_attn", "multihead_attn")

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        x = self._sublayer(
            0, self.norm1, tgt, lambda x: self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        )
        how = memory_mask, memory_key_padding_mask, memory_is_causal
        x = self._sublayer(1, self.norm2, x, lambda x: self._mha_block(x, memory, *how))
        return self._sublayer(2, self.norm3, x, self._ff_block)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "activation" in state["_modules"]:
            # torch's __setstate__ does not see an activation that is a child module, and would set F.relu instead
            nn.Module.__setstate__(self, state)
        else:
            super().__setstate__(state)
