"""GatedLSTM, GatedGRU and GatedRNN: recurrent layers with a gate for each hidden unit,
which run the vendor's kernel on folded weights.
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
from .pruned.narrowed_rnn import arguments_of, narrowed, plain_rnn
from .pruned.scaled_rnn import ScaledRNN, scaled_call, scaled_state
from .pruned.stacked_rnn import width_of

VALUE = value()
WIDTHS = get_args(names.Widths)
# elements up to which torch's own products are faster on a CPU,
# amid the memory that the vendor's kernel takes and gives
_BY_TORCH = 2**21


class GatedRecurrent(GatedLayer, nn.RNNBase):
    """A recurrent layer with a gate for each unit that it hands on, mixed in before the ``torch.nn`` layer in
    ``_dense``.

    Gates are rows of (layers * directions, P), P the hidden units, or the projected ones where there is a projection.
    The state h is read by W_hh, by W_ih of the next layer and by the caller, so there the gates are: in columns of
    those weights (dropout between layers commutes with them), in the output and in h_n. A projection writes everything
    that is read, so there they are in its rows, and nothing else is touched. Equations:
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
        """What compaction leaves where layers or directions have unequally many open units; see the arguments."""
        return self._widths

    @widths.setter
    def widths(self, value: names.Widths) -> None:
        _checks.one_of("widths", value, WIDTHS)
        self._widths = value

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _width(self) -> int:
        """P, the units of one layer and direction that others read."""
        return width_of(self)

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)
        return weight

    def reset_parameters(self) -> None:
        """As in ``torch.nn``, and fresh gates."""
        bound = self.hidden_size**-0.5 if self.hidden_size > 0 else 0.0
        for weight in self.parameters(recurse=False):
            nn.init.uniform_(weight, -bound, bound)
        self._reset_gate()

    def forward(self, input: Any, hx: Any = None) -> Any:
        z = self._rows(self.gate())
        # a shell around this layer's attributes: nothing of self changes during a call
        plain = self._dense.__new__(self._dense)
        weights = self._folded(z)
        plain.__dict__.update(self.__dict__, _flat_weights=weights, _flat_weight_refs=[None] * len(weights))
        # whoever replaced self.forward meant this layer, not the shell
        run = functools.partial(self._dense.forward, plain)
        if self.proj_size:
            return run(input, scaled_state(hx, z, lambda row: (row != 0).to(row.dtype)))
        return scaled_call(run, z, self._directions, input, hx, _gate_units)

    def _rows(self, z: Tensor) -> tuple[Tensor, ...]:
        """The gates (P,) of each layer and direction."""
        return (z,) if len(z) == self._width else z.view(-1, self._width).unbind(0)

    def _folded(self, gates: tuple[Tensor, ...]) -> list[Tensor]:
        """Every weight in the order of the vendor's kernel,
        with the gates (P,) of each layer and direction in those that they reach.
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
        return _one_buffer(folded) if folded[0].is_cuda else folded

    @classmethod
    def gates_for(cls, layer: nn.RNNBase, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have,
        one for each unit (each projected one) of each layer and direction.
        """
        return layer.num_layers * (1 + layer.bidirectional) * width_of(layer)

    @classmethod
    def from_dense(cls, layer: Any, *, gate: GateLike = "hard_concrete", widths: names.Widths = "equal") -> Any:
        """A gated layer with the very parameters of ``layer``, not copies. Raises TypeError unless its type is exactly
        the dense one.

        Where fresh gates are not 1, a projection is divided by them, so that the layer computes the same; a layer
        without one has nothing that could make up for them in its output, and ValueError is raised.
        """
        check_dense(layer, cls._dense)
        own = make_gate(gate, cls.gates_for(layer), layer.weight_ih_l0.device)
        build: Any = cls
        gated = build(**arguments_of(layer), device="meta", dtype=layer.weight_ih_l0.dtype, gate=own, widths=widths)
        gated.dropout = layer.dropout  # not through the constructor, which would warn of it once more
        for name in layer._flat_weights_names:
            setattr(gated, name, getattr(layer, name))
        gated.train(layer.training)
        gated._undo_fresh_gates()
        return gated

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
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
        """The plain recurrent layer of the same size that computes what this one computes in evaluation mode;
        parameters are copies.

        Without a projection no such layer has outputs that are scaled: where gates are not all 1 it comes in a
        :class:`ScaledRNN`. With one, h_0 has to be 0 where gates are, as every h_n of this layer is.
        :meth:`compacted` gives a smaller one.
        """
        z = self.gate.deterministic().view(-1, self._width)
        plain: nn.Module = plain_rnn(self, {name: weight.clone() for name, weight in self._folded_by_name(z).items()})
        return plain if self.proj_size or bool((z == 1).all()) else ScaledRNN(plain, z.clone()).train(self.training)

    def _folded_by_name(self, z: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._flat_weights_names, self._folded(z.unbind(0)), strict=True))

    @torch.no_grad()
    def compacted(self) -> tuple[Any, Tensor, Tensor]:
        """The smallest plain layer that computes what this one computes in evaluation mode, but for a factor on its
        output.

        Returns ``(layer, kept, scale)``: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, or a :class:`StackedRNN` of them;
        the output features of this layer that are left, int64, increasing in each direction; and their gates, of the
        same shape, so that::

            self.eval()(x)[0][..., kept] == layer.eval()(x)[0] * scale          and every other feature is 0

        The factor belongs into the columns of whatever reads the output. With a projection it is in the layer, and
        ``scale`` is 1.

        Closed units are cut out of all gate matrices, of the columns of W_hh and of the next layer, or, with a
        projection, out of its rows. All layers and directions of an ``nn`` layer have one width. With
        ``widths="equal"`` it is that of the widest here, at least 1: where fewer units are open, the first closed ones
        fill up, and nothing reads them (their columns are 0, and in the last layer their ``scale``). With
        ``widths="own"`` each keeps its open units, at least one, and where these are not equally many, the result is a
        :class:`StackedRNN`.

        A state that is given to the small layer has its units and is not gated: h_0[..., kept] / scale for the last
        layer.
        """
        return self._compacted(self.kept_units())

    @torch.no_grad()
    @settled
    def _compacted(self, units: list[Tensor]) -> tuple[Any, Tensor, Tensor]:
        z = self.gate.deterministic().view(-1, self._width)
        layer = narrowed(plain_rnn(self, self._folded_by_name(z)), units)
        kept = torch.cat([own + i * self._width for i, own in enumerate(units[-self._directions :])])
        scale = z[-self._directions :].flatten()[kept]
        return layer, kept, torch.ones_like(scale) if self.proj_size else scale

    def kept_units(self) -> list[Tensor]:
        """The units that :meth:`compacted` keeps, int64 (width,), increasing, of each layer and direction."""
        return self._kept(self.widths)

    def equal_units(self) -> list[Tensor]:
        """The same as if ``widths`` were ``"equal"``."""
        return self._kept("equal")

    @torch.no_grad()
    def _kept(self, widths: str) -> list[Tensor]:
        shut = (self.gate.deterministic() == 0).view(-1, self._width).to(torch.uint8)
        counts = (self._width - shut.sum(1)).clamp(min=1)
        counts = counts if widths == "own" else counts.max().expand_as(counts)
        first = shut.sort(dim=1, stable=True).indices  # open ones come first
        return [row[:count].sort().values for row, count in zip(first, counts.tolist(), strict=True)]

    def closed_units(self) -> list[set[int]]:
        """Of each layer, and in it of each direction, the units whose gates are closed."""
        shut = (~self.gate.is_open()).view(-1, self._width)
        return [set(row.nonzero().flatten().tolist()) for row in shut]

    def channel_gates(self) -> None:
        """None: the units of a layer are cut in all its rows alike, see :meth:`compacted`."""

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """The features of the output that are closed, and no input."""
        closed = self.closed_units()[-self._directions :]
        return {direction * self._width + unit for direction, units in enumerate(closed) for unit in units}, set()

    def group_size(self) -> Tensor:
        """|g|: how many parameters a gate switches off, (num_gates,): what :meth:`_of_units` adds up, counted."""
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
        """The weights of the next layer, by direction."""
        start = (row // self._directions + 1) * self._directions
        return self._all_weights[start : start + self._directions]

    def _of_units(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """For each gate the sum of ``of(weight)``, of a weight's shape, over what its unit switches off, (num_gates,).

        A unit's own rows (of all gate matrices with their biases, or of the projection), its columns of W_hh, where its
        own rows do not count twice, and its columns of W_ih in the next layer.
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
    layer and the caller had z h in the place of h; c, which no weight reads, is not gated. They are folded into the
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
    return x * z if _is_small(x) else functional.gate_activations(x, z, dim=-1, spec=VALUE)


def _is_small(x: Tensor) -> bool:
    return x.is_cpu and x.numel() <= _BY_TORCH and x.dtype in (torch.float32, torch.float64)


def _fold(weight: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """A weight (N, K) with gates of its columns (K,), or rows (N,), in it."""
    columns, rows = (t.double() if t is not None and weight.dtype == torch.float64 else t for t in (columns, rows))
    if _is_small(weight):
        weight = weight if rows is None else weight * rows.unsqueeze(1)
        return weight if columns is None else weight * columns
    return ops.fold_weight(weight, None, ops.GatePair.of(columns, rows, None, None, VALUE), weight.dtype)[0]


def _one_buffer(weights: list[Tensor]) -> list[Tensor]:
    """The same weights as views of one buffer, matrices before biases, which is where cuDNN looks for them;
    else it copies, and warns.
    """
    order = sorted(range(len(weights)), key=lambda i: weights[i].dim() == 1)
    buffer = torch.cat([weights[i].reshape(-1) for i in order])
    views = buffer.split([weights[i].numel() for i in order])
    placed = {i: view.view(weights[i].shape) for i, view in zip(order, views, strict=True)}
    return [placed[i] for i in range(len(weights))]
