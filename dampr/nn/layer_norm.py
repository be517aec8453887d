"""GatedLayerNorm: a layer norm with a gate on each element that it normalises.

Gates that are the same for all samples are multiplied into gain and bias; gates per sample multiply the output.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dampr import _checks, functional, names, ops
from dampr.gates import GateLike

from .gated_norm import GatedNorm
from .open_statistics import of_open


class GatedLayerNorm(GatedNorm, nn.LayerNorm):
    """``nn.LayerNorm`` with a learned gate on each of the elements it normalises: y = z * layer_norm(x).

    Args:
        normalized_shape ... dtype: as in ``nn.LayerNorm``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share; a gate for each element of
            ``normalized_shape``.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.
        statistics: "all": mean and variance are those of all elements of the input. "open": those of the elements whose
            gate in this call is not exactly 0. The layer then computes what a plain ``nn.LayerNorm`` of these elements
            alone computes, so closed elements can be cut. Not with ``per_sample``.

    With "open", the output does not depend on closed elements of the input, as long as these are finite. Gates get
    their gradient through gain and bias; that an element counts or not is a step function of its gate, with gradient 0.
    "open" needs three more passes over the input and never waits for a GPU. For the backward it keeps the tensor that
    it passes to ``F.layer_norm``, where the plain layer keeps its input. While every gate is 1 the result equals that
    of the plain layer to the bit.

    Raises: ValueError or TypeError that names the argument.
    """

    _dense = nn.LayerNorm
    _arguments = ("normalized_shape", "eps", "elementwise_affine")

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
        statistics: names.Statistics = "all",
    ) -> None:
        _check_statistics(statistics, per_sample)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._place(gate, math.prod(self.normalized_shape), per_sample, device)
        self.statistics = statistics

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        *,
        gate: GateLike = "hard_concrete",
        per_sample: bool = False,
        statistics: names.Statistics = "all",
    ) -> Any:
        """As :meth:`GatedNorm.from_dense`."""
        _check_statistics(statistics, per_sample)
        gated = super().from_dense(layer, gate=gate, per_sample=per_sample)
        gated.statistics = statistics
        return gated

    def to_dense(self) -> nn.Module:
        """The plain norm that computes what this layer computes in evaluation mode, with copies of its parameters.

        A norm without a gain gets one if gates are not all 1.

        Raises: ValueError if ``statistics="open"`` and gates are closed, because a plain norm of the same size counts
        all elements; :meth:`compacted` returns the smaller norm.
        """
        closed = self.closed_channels()[0] if self.statistics == "open" else set()
        if closed:
            raise ValueError(
                f"statistics='open' with {len(closed)} of {self.gate.num_gates} gates closed: expected all open, "
                "because a plain norm of "
                "the same size counts every element; compacted() gives that of the open ones"
            )
        return self._whole()

    def _whole(self) -> nn.Module:
        """The plain norm of the same size with the gates in gain and bias, also if it counts closed elements."""
        plain: Any = super().to_dense()
        z = self.gate.deterministic()
        left = z[z != 0] if self.statistics == "open" else z
        if self.bias is None:
            plain.bias = None
        if self.weight is None and len(left) and bool((left == 1).all()):
            plain.weight, plain.elementwise_affine = None, False
        return plain

    @torch.no_grad()
    def compacted(self) -> tuple[nn.LayerNorm, Tensor]:
        """(the plain norm of the open elements alone, the indices of these in the flattened ``normalized_shape``,
        int64).

        With n the number of dimensions of ``normalized_shape``, ``plain(x.flatten(-n)[..., kept])`` equals the open
        elements of this layer's output, and the others are 0. At least one element is left; if its gate is closed too,
        its gain and bias are 0.

        Raises: ValueError with ``statistics="all"``, which counts the closed elements.
        """
        if self.statistics != "open":
            raise ValueError(
                f"statistics={self.statistics!r}: expected 'open', because the closed elements count in the statistics"
            )
        kept = self.gate.is_open().nonzero().flatten()
        kept = kept if len(kept) else kept.new_zeros(1)
        plain: Any = self._whole()
        for name, p in list(plain.named_parameters()):
            setattr(plain, name, nn.Parameter(p.view(-1)[kept], requires_grad=p.requires_grad))
        plain.normalized_shape = (len(kept),)
        return plain, kept

    def _gain_shape(self) -> tuple[int, ...]:
        return tuple(self.normalized_shape)

    def forward(self, input: Tensor) -> Tensor:
        """The gated norm of ``input``, in its shape and dtype.

        With open statistics, closed elements are replaced so that they do not change the statistics (``of_open``), and
        the factor by which that makes the result too large is divided out of the gain.
        """
        x, shape = _checks.tensor("input", input), list(self.normalized_shape)
        if self.sharded:
            return self._on_shards(x, shape)
        if self.statistics == "open":
            z = self.gate().view(shape)
            spread, factor = of_open(x, z.detach() != 0, tuple(range(-len(shape), 0)))
            gain = (z.to(torch.promote_types(z.dtype, x.dtype)) if self.weight is None else self.weight * z) / factor
            shift = None if self.bias is None else (self.bias * z).to(self.bias.dtype)
            return F.layer_norm(
                spread, shape, gain.to(x.dtype if self.weight is None else self.weight.dtype), shift, self.eps
            )
        if not self._draws_per_sample():
            return self._normed(x, ops.LayerNorm(shape, self.eps), *self.gate.call())
        y = F.layer_norm(x, shape, self.weight, self.bias, self.eps)
        parameter, seed, spec = self.gate.call()
        flat = y.flatten(y.dim() - len(shape))
        how: dict[str, Any] = {"per_sample": True, "spec": spec, "index_offset": self.gate.index_offset(flat.shape[0])}
        return functional.gate_activations(flat, parameter, dim=-1, seed=seed, **how).view(y.shape)

    def _on_shards(self, x: Tensor, shape: list[int]) -> Tensor:
        """The forward for DTensors (tensor parallelism). Raises ValueError with ``statistics="open"``."""
        from . import sharded  # loads torch.distributed.tensor

        if self.statistics == "open":
            raise ValueError(
                "statistics='open' of a GatedLayerNorm under tensor parallelism: expected 'all', or the norm left out "
                "of the plan"
            )
        if self._draws_per_sample():
            z = self.gate(x.shape[0]).view(x.shape[0], *[1] * (x.dim() - 1 - len(shape)), *shape)
        else:
            z = self.gate().view(shape)
        return sharded.times(F.layer_norm(x, shape, self.weight, self.bias, self.eps), z)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe_gates()}"

    def _describe_gates(self) -> str:
        described = super()._describe_gates()
        return described if self.statistics == "all" else f"{described}, statistics={self.statistics!r}"


def _check_statistics(statistics: str, per_sample: bool) -> None:
    """Raise ValueError unless ``statistics`` is known and fits ``per_sample``."""
    _checks.one_of("statistics", statistics, get_args(names.Statistics))
    if _checks.flag("per_sample", per_sample) and statistics == "open":
        raise ValueError(
            "per_sample=True with statistics='open': expected False, because all samples share the elements that count"
        )
