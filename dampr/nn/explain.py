"""explain: print which backend and which route (kernel) a layer takes for an input, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dampr import ops
from dampr.functional.conv import layout_of, problem_of
from dampr.spec import SAMPLE

from .activation import GatedActivation
from .attention import GatedMultiheadAttention
from .base import GatedLayer
from .batch_norm import GatedBatchNorm
from .conv import GatedConv
from .embedding import GatedEmbedding
from .gated_norm import GatedNorm
from .layer_norm import GatedLayerNorm
from .linear import GatedLinear
from .residual import GatedResidual
from .rnn import GatedRecurrent


@dataclass(frozen=True)
class Explanation:
    """The backend and the route of a call, each with the reason; :mod:`dampr.ops.routes` describes the routes."""

    backend: str
    backend_reason: str
    route: str
    route_reason: str

    def __str__(self) -> str:
        return f"backend {self.backend}: {self.backend_reason}\nroute {self.route}: {self.route_reason}"


def explain(layer: GatedLayer, x: Tensor) -> Explanation:
    """Print and return which backend and route ``layer`` takes for the input ``x`` in its present mode, and why.

    Raises: TypeError unless ``layer`` is a gated layer and ``x`` a tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x={x!r:.80}: expected a torch.Tensor")
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if isinstance(layer, GatedLinear):
        found = _of_linear(layer, x, dtype)
    elif isinstance(layer, GatedConv):
        found = _of_convolution(layer, x, dtype)
    elif isinstance(layer, GatedNorm):
        found = _of_norm(layer, x, dtype)
    elif isinstance(layer, (GatedRecurrent, GatedActivation, GatedEmbedding, GatedMultiheadAttention, GatedResidual)):
        dtype = layer.weight.dtype if isinstance(layer, GatedEmbedding) else dtype
        found = Explanation(*ops.choose(x.device, dtype), *_of_others(layer))
    else:
        raise TypeError(f"layer={type(layer).__name__}: expected a gated layer of dampr.nn")
    print(found)
    return found


def _granularity(layer: GatedLayer) -> str | tuple[int, int]:
    """The granularity that the operator gets: a layer whose gates are grouped by an index passes one gate for each
    weight.
    """
    return "weight" if layer.granularity == "index" else layer.granularity


def _of_linear(layer: GatedLinear, x: Tensor, dtype: torch.dtype) -> Explanation:
    """The explanation for a :class:`GatedLinear` that is called with ``x``.

    ``dtype``: the dtype in which the layer multiplies x by the weight; under autocast it is not that of x.
    """
    drawn, weight, opened = layer.gate.spec.rule == SAMPLE, layer.weight, layer._open_range()
    if opened is not None:
        weight = weight[:, opened] if layer.granularity == "input" else weight[opened]
    (n, k), per_sample = weight.shape, layer.per_sample and drawn
    found = route_of((x.shape[:-1].numel(), k, n), _granularity(layer), per_sample, x.device, dtype, drawn)
    return found if opened is None else _of_slice(layer, opened, found)


def _of_slice(layer: GatedLinear | GatedConv, opened: slice, part: Explanation) -> Explanation:
    """The explanation for a layer whose open gates are one contiguous slice; ``part``: that for the slice alone."""
    count = f"{opened.stop - opened.start} of {layer.gate.num_gates} gates are open, side by side"
    reason = f"{count}: the layer is computed on their part of the weight, by route {part.route}: {part.route_reason}"
    return replace(part, route="slice", route_reason=reason)


def _of_convolution(layer: GatedConv, x: Tensor, dtype: torch.dtype) -> Explanation:
    """The explanation for a gated convolution."""
    drawn = layer.gate.spec.rule == SAMPLE
    granularity = _granularity(layer)
    weight = layer.weight
    opened = layer._open_range()
    if opened is not None and granularity == "input":
        x, weight = x.narrow(1 - weight.dim(), opened.start, opened.stop - opened.start), weight[:, opened]
    elif opened is not None:
        weight = weight[opened]
    arguments = layer.stride, layer.padding if layer.padding_mode == "zeros" else 0, layer.dilation, layer.groups
    layout = layout_of(weight.dim() - 2, x, weight, *arguments, granularity)
    problem = problem_of(layout, x, weight, layer.groups, granularity, layer.per_sample and drawn, drawn)
    backend, reason = ops.choose(x.device, dtype)
    found = Explanation(backend, reason, *ops.select(x.device, dtype).conv_route(problem))
    return found if opened is None else _of_slice(layer, opened, found)


def _of_others(
    layer: GatedRecurrent | GatedActivation | GatedEmbedding | GatedMultiheadAttention | GatedResidual,
) -> tuple[str, str]:
    """(route, reason) for layers that always take the same route in a given mode."""
    if isinstance(layer, GatedRecurrent):
        where = "rows of the projection" if layer.proj_size else "columns that read the state, and into the output"
        return "fold", f"gates are drawn once and multiplied into the {where}; the vendor's recurrent kernel runs"
    if isinstance(layer, GatedMultiheadAttention):
        if layer.per_sample and layer.gate.spec.rule == SAMPLE:
            return (
                "passes",
                "every sample has gates of its own, which multiply what its heads say before the last projection",
            )
        return (
            "fold",
            "gates are multiplied into the columns of out_proj that read their heads; torch's own attention runs",
        )
    if isinstance(layer, GatedResidual):
        return (
            "branch",
            "one multiply-add with the branch, or no branch where the gate is closed and known to be without waiting "
            "for it",
        )
    if isinstance(layer, GatedEmbedding):
        return "passes", "gates multiply the rows that were looked up"
    return (
        "passes",
        "gates are drawn in the pass that multiplies"
        if layer.index is None
        else "a gate is looked up for each element",
    )


def _of_norm(layer: GatedNorm, x: Tensor, dtype: torch.dtype) -> Explanation:
    """The explanation for a gated norm."""
    backend, reason = ops.choose(x.device, dtype)
    activation = getattr(layer, "activation", None)
    behind = " and the ReLU" if activation else ""
    if layer.per_sample and layer.gate.spec.rule == SAMPLE:
        how = (
            "a pass over the activations after the norm"
            if isinstance(layer, GatedLayerNorm)
            else f"one pass with the norm{behind}"
        )
        return Explanation(backend, reason, "passes", f"every sample has gates of its own: {how}")
    if (
        isinstance(layer, GatedBatchNorm)
        and layer.training
        and ops.has_fused_norm(x.device, dtype, False)
        and layer._fits(x, layer.gate.parameter)
    ):
        return Explanation(
            backend, reason, "passes", f"norm, gates{behind} in one pass each way, faster here than torch's own"
        )
    counted = (
        ", on an input in which closed elements hold the mean of the open ones"
        if getattr(layer, "statistics", "") == "open"
        else ""
    )
    return Explanation(
        backend, reason, "fold", f"gates are multiplied into gain and bias, and the vendor norm runs{counted}"
    )


def route_of(
    shape: tuple[int, int, int],
    granularity: str | tuple[int, int],
    per_sample: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    drawn: bool = True,
) -> Explanation:
    """As :func:`explain`, without a layer, for x (M, K) and a weight (N, K); ``shape`` is (M, K, N)."""
    m, k, n = shape
    backend, reason = ops.choose(device, dtype)
    return Explanation(
        backend, reason, *ops.select(device, dtype).route(m, n, k, dtype, granularity, per_sample, device, drawn)
    )
