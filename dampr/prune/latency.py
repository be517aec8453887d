"""The time of the compacted model on this device, from a table of what each layer takes at some of its widths."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from dampr import _progress
from dampr.gates.ranks import over_ranks
from dampr.nn import PrunedMultiheadAttention

from . import graph, inputs, noise
from .cost import Cost, Term, Width, sum_of
from .modules import by_name
from .unit_structure import Counts

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a width, at least one channel, where layers are timed
_ATTENDED = "query", "key", "value"
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Latency(Cost):
    """Seconds of an evaluation pass, as a function of the vector of all gates, like :class:`Cost`.

    Every layer that gates can narrow is timed on its own at five widths of what it reads and five of what it writes,
    and between these its time is interpolated; more channels never count as less time. What the layers do not account
    for (what is between them, and that they run one after the other) is fixed. ``total`` is the median time of the
    model as it is.

    Of a model with gates on parameters the products of activations (the scores of attention) count as fixed.
    Layers that are called several times count as often; recurrent layers and attention with whole sequences as in the
    example inputs. A recurrent layer whose layers and directions have widths of their own counts as one of their mean
    width.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__(model, example_inputs, "latency")

    def _find_terms(self, plain: nn.Module, example_inputs: Any) -> list[Term]:
        """One for each layer that has a width that gates can change."""
        layers = by_name(plain, (*graph.GEMMS, nn.RNNBase, nn.MultiheadAttention))
        terms = []
        for name, layer in layers.items():
            if isinstance(self._variables, Counts):
                found = [self._variables.width(layer, writes) for writes in (False, True)]
                read, written = (Width(1) if own is None else Width(*own) for own in found)
            elif isinstance(layer, nn.MultiheadAttention):
                read, written = self._variables.width(layer, False), self._variables.heads(layer)
            elif isinstance(layer, nn.RNNBase):
                read, written = self._variables.width(layer, False), _mean(self._variables.rows(layer))
            else:
                read = Width(1) if graph.is_depthwise(layer) else self._variables.width(layer, False)
                written = self._variables.width(layer, True)
            if read.weights or written.weights:
                terms.append(Term(name, read, written, 0.0))
        return terms

    def _measure(self, plain: nn.Module, example_inputs: Any) -> float:
        calls = calls_of([plain.get_submodule(term.name) for term in self.terms], plain, example_inputs)
        known: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}
        tables = []
        with inputs.evaluating(plain), noise.kept(plain), torch.no_grad():
            for term in _progress.track(self.terms, "timing layers"):
                layer = plain.get_submodule(term.name)
                key = (
                    repr(layer),
                    bool(term.read.weights),
                    bool(term.written.weights),
                    repr([_shapes(call) for call in calls[layer]]),
                )
                if key not in known:
                    known[key] = _table(layer, calls[layer], term, self.device)
                tables.append(known[key])
            total = seconds_of(lambda: inputs.call(plain, example_inputs), self.device)
        empty = torch.zeros(0, len(SHARES), dtype=torch.float64)
        reads, writes, seconds = zip(*tables, strict=True) if tables else ([empty], [empty], [empty])
        self._reads, self._writes, self._seconds = (
            torch.stack(list(t)).to(self.device) for t in (reads, writes, seconds)
        )
        # layers alone may take longer than the whole
        self._seconds *= min(1.0, total / max(float(self._seconds[:, -1, -1].sum()), 1e-12))
        return total

    def share(self) -> None:
        """Take the mean times of all ranks, which would otherwise decide by their own."""
        self._seconds = over_ranks(self._seconds)
        self.total = float(over_ranks(torch.tensor(self.total, dtype=torch.float64, device=self.device)))
        self._fixed = 0.0
        self._fixed = self.total - float(self(torch.ones(self.structure.size)))

    def _each(self, read: Tensor, written: Tensor) -> Tensor:
        (i, u), (j, v) = _between(self._reads, read), _between(self._writes, written)
        rows = torch.arange(len(read), device=read.device)
        t = self._seconds
        low = t[rows, i, j] * (1 - v) + t[rows, i, j + 1] * v
        high = t[rows, i + 1, j] * (1 - v) + t[rows, i + 1, j + 1] * v
        return low * (1 - u) + high * u


def _mean(rows: list[Width]) -> Width:
    total = sum_of(rows)
    return Width(total.constant / len(rows), {number: weight / len(rows) for number, weight in total.weights.items()})


def _between(knots: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each element of x, (n,), the knot below it in its row of (n, k), and how far it is on the way to the next."""
    index = (torch.searchsorted(knots, x.detach().unsqueeze(1), right=True).squeeze(1) - 1).clamp(0, knots.shape[1] - 2)
    low, high = (knots.gather(1, (index + step).unsqueeze(1)).squeeze(1) for step in (0, 1))
    return index, (x - low) / (high - low)


def _table(layer: nn.Module, calls: list[Call], term: Term, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Widths read, (k,), widths written, (k,), and seconds at each pair, (k, k);
    an axis that gates leave alone has one time.
    """
    reads, writes = _knots(layer, False, bool(term.read.weights)), _knots(layer, True, bool(term.written.weights))
    full = _full(layer, False), _full(layer, True)
    found: dict[tuple[int, int], float] = {}
    seconds = torch.zeros(len(SHARES), len(SHARES), dtype=torch.float64)
    for i, read in enumerate(reads.tolist()):
        for j, written in enumerate(writes.tolist()):
            size = min(int(read), full[0]), min(int(written), full[1])
            if size not in found:
                narrow: Any = (
                    _narrow(layer, *size, bool(term.read.weights)).to(device, next(layer.parameters()).dtype).eval()
                )
                args = [_narrow_call(layer, call, getattr(narrow, "in_channels", size[0])) for call in calls]
                found[size] = sum(seconds_of(functools.partial(narrow, *a, **kw), device) for a, kw in args)
            seconds[i, j] = found[size]
    return reads, writes, seconds.cummax(0).values.cummax(1).values


def _knots(layer: Any, writes: bool, varies: bool) -> Tensor:
    """Increasing widths up to the full one, (k,); where these are fewer than k, or do not vary, others beyond it,
    which count as full.
    """
    size = _full(layer, writes)
    widths = sorted({max(1, round(share * size)) for share in SHARES}) if varies else [size]
    return torch.tensor([*widths, *range(size + 1, size + 1 + len(SHARES) - len(widths))], dtype=torch.float64)


def _full(layer: Any, writes: bool) -> int:
    """The width of the whole layer: channels, heads, or units of one direction."""
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.num_heads) if writes else layer.embed_dim
    if isinstance(layer, nn.RNNBase) and writes:
        return int(layer.proj_size or layer.hidden_size)
    return graph.channel_count(layer, writes)


def _narrow(layer: Any, read: int, written: int, within: bool = False) -> nn.Module:
    """A layer like this one that reads and writes so many channels, with random weights.

    Of a convolution in groups ``read`` are those of one group; ``within``: every group loses some, and none goes as a
    whole.
    """
    if isinstance(layer, nn.Linear):
        return nn.Linear(read, written, layer.bias is not None)
    if isinstance(layer, nn.MultiheadAttention):
        others = [read if size == layer.embed_dim else size for size in (layer.kdim, layer.vdim)]
        how = (
            layer.dropout,
            layer.in_proj_bias is not None,
            layer.bias_k is not None,
            layer.add_zero_attn,
            *others,
            layer.batch_first,
        )
        return PrunedMultiheadAttention(read, layer.num_heads, *how, heads=range(written), head_dim=layer.head_dim)
    if isinstance(layer, nn.RNNBase):
        same = {
            name: getattr(layer, name)
            for name in ("num_layers", "bias", "batch_first", "bidirectional", "nonlinearity")
            if hasattr(layer, name)
        }
        sizes = (
            {"hidden_size": layer.hidden_size, "proj_size": written} if layer.proj_size else {"hidden_size": written}
        )
        recurrent: Any = type(layer)
        narrow: nn.Module = recurrent(read, **sizes, **same)
        return narrow
    groups = layer.groups
    if groups > 1 and not within:
        groups = max(1, round(groups * written / layer.out_channels))
    each = layer.out_channels // layer.groups if not within else max(1, round(written / groups))
    how = layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups, layer.bias is not None
    convolution: nn.Module = type(layer)(
        read * groups, written if layer.groups == 1 else each * groups, *how, layer.padding_mode
    )
    return convolution


def calls_of(layers: list[nn.Module], plain: nn.Module, example_inputs: Any) -> dict[nn.Module, list[Call]]:
    """What each layer is called with."""
    found: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: found[layer].append((args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    with inputs.removing(hooks):
        inputs.evaluate(plain, example_inputs)
    return found


def _narrow_call(layer: nn.Module, call: Call, read: int) -> Call:
    """The same call with so many channels in its input; of a recurrent layer without a state."""
    args, kwargs = call
    if isinstance(layer, nn.MultiheadAttention):
        given = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(_ATTENDED)]
        # one tensor stays one
        narrow = {id(t): t[..., :read].contiguous() if t.shape[-1] == layer.embed_dim else t for t in given}
        return (*(narrow[id(t)] for t in given), *args[3:]), {
            name: value for name, value in kwargs.items() if name not in _ATTENDED
        }
    x, *_ = (*args, *kwargs.values())
    if isinstance(x, PackedSequence):
        return (x._replace(data=x.data[:, :read].contiguous()),), {}
    spatial: Any = () if isinstance(layer, (nn.Linear, nn.RNNBase)) else layer.kernel_size
    dim = x.dim() - len(spatial) - 1
    return (x.narrow(dim, 0, read).clone(memory_format=torch.preserve_format),), {}


def _shapes(call: Call) -> list[Any]:
    leaves = pytree.tree_leaves(call)
    return [(t.shape, t.stride()) if isinstance(t, Tensor) else t for t in leaves]


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int = 7, least: float = 1e-3) -> float:
    """The median over rounds of the time of one call; a round lasts ``least`` seconds at least."""

    def timed(repeats: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    repeats = max(1, math.ceil(least / max(timed(2), 1e-9)))
    return statistics.median(timed(repeats) for _ in range(rounds))
