"""GatedLSTM, GatedGRU and GatedRNN: recurrent layers with a gate for each hidden unit.

The gates are multiplied into copies of the weights in each call, and then the recurrent kernel of cuDNN or oneDNN runs
unchanged. It would be slower to multiply the state by gates in every time step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dampr import _checks, functional, names, ops
from dampr.gates import GateLike, make_gate
from dampr.spec import value

from .base import GatedLayer, fresh_values, wide_dtype
from .computed import check_dense, refresh, settled
from .parameter import recurrent_weights
from .pruned.narrowed_rnn import arguments_of, narrowed, plain_rnn
from .pruned.scaled_rnn import ScaledRNN, scaled_call, scaled_state
from .pruned.stacked_rnn import width_of

VALUE = value()
WIDTHS = get_args(names.Widths)
# up to this many elements torch's own products are faster on a CPU than ours, measured within whole layers
_BY_TORCH = 2**21


class GatedRecurrent(GatedLayer, nn.RNNBase):
    """A recurrent layer with a gate for each unit of its output; mixed in before the ``torch.nn`` layer in ``_dense``.

    Gates are (layers * directions, P) in rows, where P is ``proj_size`` if the layer projects its state and else
    ``hidden_size``. Three things read the state h: W_hh, W_ih of the next layer, and the caller. So the gates multiply
    the columns of these weights, the output and h_n. (Dropout between layers commutes with the gates.) With a
    projection all readers get projected values, so its rows alone are multiplied. Equations:
    :mod:`dampr.reference.gated_rnn`.
    """

    _dense: Any

    def __init__(
        self,
        *args: Any,
        gate: GateLike = "hard_concrete",
        widths: names.Widths = "equal",
        **kwargs: Any,
    ) -> None:
        _checks.one_of("widths", widths, WIDTHS)
        super().__init__(*args, **kwargs)
        self.granularity = "output"
        self._widths = widths
        self.per_sample = False
        device = self._weight("weight_ih_l0").device
        self.gate = make_gate(gate, self.num_layers * self._directions * self._width, device)

    @property
    def widths(self) -> names.Widths:
        """What compaction leaves if layers or directions have different numbers of open units: "equal" or "own"."""
        return self._widths

    @widths.setter
    def widths(self, value: names.Widths) -> None:
        _checks.one_of("widths", value, WIDTHS)
        self._widths = value

    @property
    def _directions(self) -> int:
        """2 for a bidirectional layer, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def _width(self) -> int:
        """P, the number of units of one layer and direction that others read."""
        return width_of(self)

    def _weight(self, name: str) -> Tensor:
        """The weight of this name."""
        weight: Tensor = getattr(self, name)
        return weight

    def reset_parameters(self) -> None:
        """As in ``torch.nn``, and fresh gates."""
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0.0
        for weight in self.parameters(recurse=False):
            nn.init.uniform_(weight, -bound, bound)
        self._reset_gate()

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the recurrent layer of torch, with the outputs of each unit times its gate. Gates are drawn once per call,
        so all steps have the same.
        """
        z = self._rows(self.gate())
        # run the dense forward on a second object with the folded weights, so that no attribute of self changes
        plain = self._dense.__new__(self._dense)
        weights = self._folded(z)
        plain.__dict__.update(self.__dict__, _flat_weights=weights, _flat_weight_refs=[None] * len(weights))
        # the class's forward, because ``plain`` has the attributes of self, among them a replaced ``self.forward``
        run = functools.partial(self._dense.forward, plain)
        if self.proj_size:
            return run(input, scaled_state(hx, z, lambda row: (row != 0).to(row.dtype)))
        return scaled_call(run, z, self._directions, input, hx, _gate_units)

    def _rows(self, z: Tensor) -> tuple[Tensor, ...]:
        """The gates (P,) of each layer and direction."""
        return (z,) if len(z) == self._width else z.view(-1, self._width).unbind(0)

    def _folded(self, gates: tuple[Tensor, ...]) -> list[Tensor]:
        """All weights in the order of the vendor's kernel, multiplied by the gates that they read.

        ``gates``: (P,) for each layer and direction.
        """
        each = self._directions
        folded = []
        for row, weights in enumerate(self._all_weights):
            below = gates[row // each * each - each : row // each * each]
            for name in weights:
                weight = self._weight(name)
                if self.proj_size:
                    if name.startswith("weight_hr"):
                        weight = _fold(weight, None, gates[row])
                elif name.startswith("weight_hh"):
                    weight = _fold(weight, gates[row], None)
                elif name.startswith("weight_ih") and below:
                    weight = _fold(weight, below[0] if each == 1 else torch.cat(below), None)
                folded.append(weight)
        return recurrent_weights(folded)

    @classmethod
    def gates_for(cls, layer: nn.RNNBase, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have: one for each unit (each projected unit) of each layer and
        direction.
        """
        return layer.num_layers * (1 + layer.bidirectional) * width_of(layer)

    @classmethod
    def from_dense(cls, layer: Any, *, gate: GateLike = "hard_concrete", widths: names.Widths = "equal") -> Any:
        """A gated layer that takes over the parameters of ``layer`` themselves, not copies.

        If fresh gates are not 1, a projection is divided by them, so that the layer computes the same.

        Raises: TypeError unless the type of ``layer`` is exactly the dense one; ValueError if fresh gates are not 1 and
        the layer has no projection, because then nothing can make up for them in its output.
        """
        check_dense(layer, cls._dense)
        own = make_gate(gate, cls.gates_for(layer), layer.weight_ih_l0.device)
        build: Any = cls
        gated = build(**arguments_of(layer), device="meta", dtype=layer.weight_ih_l0.dtype, gate=own, widths=widths)
        gated.dropout = layer.dropout  # not through the constructor, which warns about dropout in a single layer
        for name in layer._flat_weights_names:
            setattr(gated, name, getattr(layer, name))
        gated.train(layer.training)
        gated._undo_fresh_gates()
        return gated

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
        """Divide the projection by fresh gates that are not 1. Raises ValueError without a projection, or if a gate
        is 0.
        """
        if self.gate.starts_at_one():
            return
        z = fresh_values(self.gate).view(-1, self._width)
        if not self.proj_size or not bool((z != 0).all()):
            raise ValueError(
                f"gate={type(self.gate).__name__}: fresh gates are not 1, and nothing in {self._dense.__name__} can "
                "make up for them; "
                "expected a family or an instance whose fresh gates are 1"
            )
        for row, weights in enumerate(self._all_weights):
            projection = self._weight(weights[-1])
            projection.data = (projection / z[row].unsqueeze(1)).to(projection.dtype)

    @torch.no_grad()
    @settled
    def to_dense(self) -> nn.Module:
        """The plain recurrent layer of the same size that computes what this layer computes in evaluation mode.

        Its parameters are copies. Without a projection no ``torch.nn`` layer can scale its output, so if gates are not
        all 1 the layer comes inside of a :class:`ScaledRNN`. With a projection, h_0 has to be 0 where gates are 0, as
        every h_n of this layer is. :meth:`compacted` returns a smaller layer.
        """
        z = self.gate.deterministic().view(-1, self._width)
        plain: nn.Module = plain_rnn(self, {name: weight.clone() for name, weight in self._folded_by_name(z).items()})
        return plain if self.proj_size or bool((z == 1).all()) else ScaledRNN(plain, z.clone()).train(self.training)

    def _folded_by_name(self, z: Tensor) -> dict[str, Tensor]:
        """The weights times the gates z, (layers * directions, P), by name."""
        return dict(zip(self._flat_weights_names, self._folded(z.unbind(0)), strict=True))

    @torch.no_grad()
    def compacted(self) -> tuple[Any, Tensor, Tensor]:
        """The smallest plain layer that computes what this layer computes in evaluation mode, up to a factor on its
        output.

        Returns: ``(layer, kept, scale)``. ``layer`` is an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, or a
        :class:`StackedRNN` of them. ``kept``, int64, lists the output features of this layer that are left, increasing
        within each direction. ``scale``, of the same shape, holds their gates::

            self.eval()(x)[0][..., kept] == layer.eval()(x)[0] * scale          and every other feature is 0

        The layer that reads the output has to take the factor into its columns. With a projection the factor is in
        ``layer`` already, and ``scale`` is 1.

        Closed units are deleted from the rows of all gate matrices, from the columns of W_hh and of the next layer, or,
        with a projection, from the rows of the projection. All layers and directions of a ``torch.nn`` layer have the
        same width. With ``widths="equal"`` this is the largest number of open units, at least 1; layers with fewer are
        filled up with closed units, which nothing reads (their columns are 0, and in the last layer their ``scale``).
        With ``widths="own"`` each layer and direction keeps its open units, at least one; if their numbers differ, the
        result is a :class:`StackedRNN`.

        An initial state for the small layer has only its units and is not gated: h_0[..., kept] / scale for the last
        layer.
        """
        return self._compacted(self.kept_units())

    @torch.no_grad()
    @settled
    def _compacted(self, units: list[Tensor]) -> tuple[Any, Tensor, Tensor]:
        """:meth:`compacted` with these units of each layer and direction."""
        z = self.gate.deterministic().view(-1, self._width)
        layer = narrowed(plain_rnn(self, self._folded_by_name(z)), units)
        kept = torch.cat([own + i * self._width for i, own in enumerate(units[-self._directions :])])
        scale = z[-self._directions :].flatten()[kept]
        return layer, kept, torch.ones_like(scale) if self.proj_size else scale

    @torch.no_grad()
    @settled
    def _scales(self, units: list[Tensor]) -> Tensor:
        """The gates of these units of each layer and direction, (layers * directions, width)."""
        z = self.gate.deterministic().view(-1, self._width)
        return torch.stack([row[own] for row, own in zip(z, units, strict=True)])

    def kept_units(self) -> list[Tensor]:
        """For each layer and direction the units that :meth:`compacted` keeps, int64 (width,), increasing."""
        return self._kept(self.widths)

    def equal_units(self) -> list[Tensor]:
        """:meth:`kept_units` as if ``widths`` were "equal"."""
        return self._kept("equal")

    @torch.no_grad()
    def _kept(self, widths: str) -> list[Tensor]:
        """:meth:`kept_units` for this value of ``widths``."""
        shut = (self.gate.deterministic() == 0).view(-1, self._width).to(torch.uint8)
        counts = (self._width - shut.sum(1)).clamp(min=1)
        counts = counts if widths == "own" else counts.max().expand_as(counts)
        first = shut.sort(dim=1, stable=True).indices  # open ones come first
        return [row[:count].sort().values for row, count in zip(first, counts.tolist(), strict=True)]

    def closed_units(self) -> list[set[int]]:
        """For each layer and direction, in the order of h_n, the set of units whose gates are closed."""
        shut = (~self.gate.is_open()).view(-1, self._width)
        return [set(row.nonzero().flatten().tolist()) for row in shut]

    def channel_gates(self) -> None:
        """None: a unit is not an output channel of a single weight; it is cut in several weights together."""

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """(the output features whose gates are closed, an empty set)."""
        closed = self.closed_units()[-self._directions :]
        return {direction * self._width + unit for direction, units in enumerate(closed) for unit in units}, set()

    def group_size(self) -> Tensor:
        """|g|, how many parameters each gate switches off, (num_gates,): the elements that :meth:`_of_units` sums
        over.
        """
        sizes = []
        for row, weights in enumerate(self._all_weights):
            gate_rows = self._weight(weights[1]).shape[0]  # of all gate matrices
            if self.proj_size:
                own = self.hidden_size
            else:
                own = (
                    sum(self._weight(name).numel() for name in weights) // self.hidden_size
                    - gate_rows // self.hidden_size
                )
            sizes.append(own + gate_rows * (1 + len(self._readers(row))))
        device = self._weight("weight_ih_l0").device
        return torch.tensor(sizes, dtype=torch.float32, device=device).repeat_interleave(self._width)

    def _readers(self, row: int) -> list[list[str]]:
        """The weights of the next layer, a list of names for each direction; empty for the last layer."""
        start = (row // self._directions + 1) * self._directions
        return self._all_weights[start : start + self._directions]

    def _of_units(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """For each gate the sum of ``of(weight)`` over the elements of weights that its unit needs, (num_gates,).

        These are the rows of the unit in all gate matrices and biases (or in the projection), its columns of W_hh
        without the elements that are in its own rows, and its columns of W_ih in the next layer.

        ``of`` maps a weight to a tensor of the same shape.
        """
        each, found = self._directions, []
        for row, weights in enumerate(self._all_weights):
            recurrent = of(self._weight(weights[1]))
            total = recurrent.sum(0)
            if self.proj_size:
                total = total + of(self._weight(weights[-1])).sum(1)
            else:
                for name in weights:
                    total = total + of(self._weight(name)).reshape(
                        -1, self.hidden_size, self._weight(name).shape[1:].numel()
                    ).sum((0, 2))
                own = recurrent.reshape(-1, self.hidden_size, self.hidden_size)
                total = total - own.diagonal(dim1=1, dim2=2).sum(0)
            for reader in self._readers(row):
                total = total + of(self._weight(reader[0])).sum(0).unflatten(0, (each, -1))[row % each]
            found.append(total)
        return torch.cat(found)

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        cost = lam * self.group_size()
        if prior_precision:
            refresh(self)
            cost = cost + 0.5 * prior_precision * self._of_units(lambda weight: wide_dtype(weight).square())
        total: Tensor = (self.gate.open_probability() * cost).sum()
        return total


class GatedLSTM(GatedRecurrent, nn.LSTM):
    """``nn.LSTM`` with a learned gate for each hidden unit (each projected one with ``proj_size``) of each direction
    and layer.

    Args:
        input_size ... dtype: as in ``nn.LSTM``, by position or name.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share, with layers * directions *
            units gates in the order of h_n.
        widths: what compaction leaves where layers or directions have unequally many open units: ``"equal"``, one
            ``nn`` module as wide everywhere as the widest; ``"own"``, a :class:`StackedRNN`, each layer and direction
            as wide as its own open units. It can be set at any time; budgets count by it.

    Called as ``nn.LSTM`` is, with the same results: batched or not, packed or not, with or without a state. The gates
    are drawn once per call. They multiply h wherever a weight or the caller reads it, as if W_hh, W_ih of the next
    layer and the caller had z h in place of h; c, which no weight reads, is not gated. They are folded into the
    weights, and the vendor's kernel runs as it is.

    h_n is gated, and h_0 is taken to be (it counts as h_0 / z, and as 0 where z is 0), so with the same gates two
    halves of a sequence give what the whole one does.

    Under ``torch.compile`` it is one graph where torch compiles recurrent layers at all
    (``torch._dynamo.config.allow_rnn``).

    Parameters come first in ``parameters()`` with the names of ``nn.LSTM``; a dense ``state_dict`` loads and leaves the
    gates as they are. A fresh layer equals the dense one in evaluation mode, to the bit.

    Raises: ValueError or TypeError that names the argument, and what ``nn.LSTM`` raises.
    """

    _dense = nn.LSTM


class GatedGRU(GatedRecurrent, nn.GRU):
    """``nn.GRU`` with a learned gate for each hidden unit of each direction and layer; everything as in
    :class:`GatedLSTM`.

    What is not gated is a unit's memory of itself: h' = (1 - u) n + u h. A state that was computed with other gates
    than those of the call (h_0 of the step before, in training) enters it as h_0 / z, which a small z makes large;
    start such a step without a state, or with the gates in evaluation mode.
    """

    _dense = nn.GRU


class GatedRNN(GatedRecurrent, nn.RNN):
    """``nn.RNN`` with a learned gate for each hidden unit of each direction and layer;
    everything as in :class:`GatedLSTM`.
    """

    _dense = nn.RNN


def _gate_units(x: Tensor, z: Tensor) -> Tensor:
    """x (..., H) times gates z (H,)."""
    return x * z if _is_small(x) else functional.gate_activations(x, z, dim=-1, spec=VALUE)


def _is_small(x: Tensor) -> bool:
    """Whether torch multiplies a tensor faster than our kernels: a small one of float32 or float64 on a CPU."""
    return x.is_cpu and x.numel() <= _BY_TORCH and x.dtype in (torch.float32, torch.float64)


def _fold(weight: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """A weight (N, K) with gates of its columns (K,), or rows (N,), in it."""
    columns, rows = (t.double() if t is not None and weight.dtype == torch.float64 else t for t in (columns, rows))
    if _is_small(weight):
        weight = weight if rows is None else weight * rows.unsqueeze(1)
        return weight if columns is None else weight * columns
    return ops.fold_weight(weight, None, ops.GatePair.of(columns, rows, None, None, VALUE), weight.dtype)[0]
