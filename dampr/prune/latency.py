"""The time of the compacted model on this device, interpolated in a table of the times of each layer at some of its
widths.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dampr import _progress
from dampr.gates.ranks import over_ranks

from . import hooks, inputs, noise
from .cost import Cost
from .layers.base import Call, Counted
from .layers.registry import counted_in
from .terms import Term
from .unit_structure import Counts

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # a layer is timed at these shares of its width, but with one channel at least


class Latency(Cost):
    """The seconds of an evaluation pass as a function of the vector of all gates, like :class:`Cost`.

    Every layer that gates can narrow is timed by itself at five widths of what it reads and five of what it writes.
    Times between these are interpolated. More channels never count as less time. The rest of the pass (operations
    between layers, and overhead) counts as a constant. ``total`` is the median time of the model as it is.

    A layer that is called several times counts as often. Recurrent layers and attention are timed on sequences as long
    as in the example inputs. A recurrent layer whose layers and directions have widths of their own is timed at their
    mean width. In a model with gates on parameters, products of activations (the scores of attention) belong to the
    constant.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        super().__init__(model, example_inputs, "latency")

    def _find_terms(self, plain: nn.Module, example_inputs: Any) -> list[Term]:
        """One term for each layer with a width that gates can change."""
        terms = []
        for name, layer, kind in counted_in(plain):
            if isinstance(self._variables, Counts):
                read, written = (self._variables.width(layer, writes) for writes in (False, True))
            else:
                read, written = kind.timed_widths(layer, self._variables)
            if read.weights or written.weights:
                terms.append(Term(name, read, written, 0.0))
        return terms

    def _measure(self, plain: nn.Module, example_inputs: Any) -> float:
        """Time every layer at its widths, and the whole model, on ``example_inputs``. Returns: the seconds of the
        model.
        """
        calls = calls_of([plain.get_submodule(term.name) for term in self.terms], plain, example_inputs)
        kinds = {layer: kind for _, layer, kind in counted_in(plain)}
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
                    known[key] = _table(kinds[layer], layer, calls[layer], term, self.device)
                tables.append(known[key])
            total = seconds_of(lambda: inputs.call(plain, example_inputs), self.device)
        shapes = (len(SHARES),), (len(SHARES),), (len(SHARES), len(SHARES))
        self._reads, self._writes, self._seconds = (
            torch.stack(own).to(self.device) if own else torch.zeros(0, *shape, dtype=torch.float64, device=self.device)
            for shape, own in ((shape, [table[i] for table in tables]) for i, shape in enumerate(shapes))
        )
        # Layers timed one by one may take longer than the whole model, which the table must not exceed.
        self._seconds *= min(1.0, total / max(float(self._seconds[:, -1, -1].sum()), 1e-12))
        return total

    def share(self) -> None:
        """Replace the times by their means over all ranks. Each rank measures other times, and with these it would
        close other gates.
        """
        self._seconds = over_ranks(self._seconds)
        self.total = float(over_ranks(torch.tensor(self.total, dtype=torch.float64, device=self.device)))
        self._fixed = 0.0
        self._fixed = self.total - float(self(torch.ones(self.structure.size)))

    def _each(self, read: Tensor, written: Tensor) -> Tensor:
        """The seconds of each layer, (terms,), bilinear between the widths of the table.

        ``read``, ``written``: the widths that are left, (terms,).
        """
        (i, u), (j, v) = _between(self._reads, read), _between(self._writes, written)
        rows = torch.arange(len(read), device=read.device)
        t = self._seconds
        low = t[rows, i, j] * (1 - v) + t[rows, i, j + 1] * v
        high = t[rows, i + 1, j] * (1 - v) + t[rows, i + 1, j + 1] * v
        return low * (1 - u) + high * u


def _between(knots: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where each element of ``x``, (n,), lies in its row of ``knots``, (n, k).

    Returns: the index of the knot below it, and the share of the way from there to the next knot.
    """
    index = (torch.searchsorted(knots, x.detach().unsqueeze(1), right=True).squeeze(1) - 1).clamp(0, knots.shape[1] - 2)
    low, high = (knots.gather(1, (index + step).unsqueeze(1)).squeeze(1) for step in (0, 1))
    return index, (x - low) / (high - low)


def _table(
    kind: Counted, layer: nn.Module, calls: list[Call], term: Term, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Time a layer at pairs of widths.

    Returns: widths read, (k,), widths written, (k,), and the seconds at each pair, (k, k). Along a side that gates
    cannot narrow, the times are equal.
    """
    full = kind.timed_size(layer, False), kind.timed_size(layer, True)
    within = bool(term.read.weights)
    reads, writes = _knots(full[0], within), _knots(full[1], bool(term.written.weights))
    found: dict[tuple[int, int], float] = {}
    seconds = torch.zeros(len(SHARES), len(SHARES), dtype=torch.float64)
    for i, read in enumerate(reads.tolist()):
        for j, written in enumerate(writes.tolist()):
            size = min(int(read), full[0]), min(int(written), full[1])
            if size not in found:
                narrow: Any = kind.narrow(layer, *size, within).to(device, next(layer.parameters()).dtype).eval()
                args = [kind.narrow_call(layer, call, getattr(narrow, "in_channels", size[0])) for call in calls]
                found[size] = sum(seconds_of(functools.partial(narrow, *a, **kw), device) for a, kw in args)
            seconds[i, j] = found[size]
    return reads, writes, seconds.cummax(0).values.cummax(1).values


def _knots(size: int, varies: bool) -> Tensor:
    """k increasing widths up to ``size``, the full one, float64.

    If there are fewer such widths than k, or the width does not vary, larger numbers follow; they have the time of the
    full width.
    """
    widths = sorted({max(1, round(share * size)) for share in SHARES}) if varies else [size]
    return torch.tensor([*widths, *range(size + 1, size + 1 + len(SHARES) - len(widths))], dtype=torch.float64)


def calls_of(layers: list[nn.Module], plain: nn.Module, example_inputs: Any) -> dict[nn.Module, list[Call]]:
    """The arguments of every call of each layer in one run on the example inputs."""
    found: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: found[layer].append((args, kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    with hooks.removing(handles):
        inputs.evaluate(plain, example_inputs)
    return found


def _shapes(call: Call) -> list[Any]:
    """What the time of a call depends on: shape and stride of each tensor, and all other arguments."""
    leaves = pytree.tree_leaves(call)
    return [(t.shape, t.stride()) if isinstance(t, Tensor) else t for t in leaves]


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int = 7, least: float = 1e-3) -> float:
    """The median time in seconds of one call over ``rounds`` rounds; a round repeats it for at least ``least``
    seconds.
    """

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
