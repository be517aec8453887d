"""Base classes of gated layers.

:class:`GatedLayer` is what penalties, summaries and compaction call on every gated layer. :class:`GatedWeight` holds
what layers with one gated weight share: linear layers and convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from dampr import _checks, names
from dampr.gates import Gate, GateLike, make_gate
from dampr.ops.node import needs_dispatcher
from dampr.reference import expand_blocks
from dampr.spec import SAMPLE, GateSpec, value

from .computed import check_dense, refresh, settled

VECTOR_GRANULARITIES = get_args(names.VectorGranularity)
Granularity = names.Granularity | tuple[int, int]
VALUE = value()


class KeepsIndex:
    """Mixin of modules with a buffer ``index``, the gate of each element, which is in no state dict."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in ``torch.nn``, but the values of ``index`` stay: ``to_empty`` would lose them, and no state dict
        restores them.
        """
        index: Tensor | None = self.__dict__["_buffers"].get("index")
        applied: Any = super()._apply(fn, recurse)  # type: ignore[misc]
        if index is not None and not index.is_meta:
            moved: Tensor = self.__dict__["_buffers"]["index"]
            if moved.is_meta or not torch.equal(moved.cpu(), index.cpu()):
                self.__dict__["_buffers"]["index"] = index if moved.is_meta else index.to(moved.device)
        return applied


class GatedLayer(KeepsIndex):
    """Mixin of all gated layers.

    Attributes:
        gate: the :class:`dampr.gates.Gate` with the layer's gates.
        granularity: what one gate multiplies, such as "output" or "input".
        per_sample: whether gates are drawn for each sample in training.
        sharded: whether parameters or inputs may be DTensors
            (:func:`dampr.integrations.distributed.parallelize_module` sets it).
    """

    gate: Gate
    granularity: str | tuple[int, int]
    per_sample: bool
    sharded: bool = False  # whether DTensors may come here (dampr.integrations.distributed.parallelize_module)

    def reset_parameters(self) -> None:
        """Set new random parameters as ``torch.nn`` does, and fresh gates."""
        reset: Any = getattr(super(), "reset_parameters", None)  # some layers of torch have none
        if reset is not None:
            reset()
        self._reset_gate()

    def _reset_gate(self) -> None:
        """Set the gates to their start values; does nothing in the constructor of torch, which resets before there are
        gates.
        """
        gate: Any = self.__dict__["_modules"].get("gate")
        if gate is not None:  # torch's constructors reset before there is one
            gate.reset_parameters()

    def register_parameter(self, name: str, param: Any) -> None:
        """As in ``torch.nn``, but a DTensor is refused for a parameter that is not sharded yet.

        torch's ``parallelize_module`` would shard gates too, which must be whole on every rank, so the error names the
        function of dampr to use instead. Allowed are parameters that were sharded before (a state dict sets them), and
        those of recurrent layers, which ``fully_shard`` sets.

        Raises: TypeError for such a DTensor.
        """
        former: Any = self.__dict__["_parameters"].get(name)
        sharded = self.sharded or type(former).__name__ == "DTensor" or isinstance(self, nn.RNNBase)
        if not sharded and type(param).__name__ == "DTensor":
            raise TypeError(
                f"{type(self).__name__}.{name}: parallelize_module of torch would shard gates too; expected "
                "dampr.integrations.distributed.parallelize_module, of the same arguments"
            )
        super().register_parameter(name, param)  # type: ignore[misc]

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        """The layer's expected L0 penalty, a scalar; Louizos et al. 2018, eq. 9 and appendix A.

        See :func:`dampr.penalty`.
        """
        raise NotImplementedError

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """(the output channels, the input channels) that closed gates switch off altogether, two sets of indices."""
        raise NotImplementedError

    def channel_gates(self) -> Tensor | None:
        """The gate of each output channel (each input channel for granularity "input"), int64; None if channels have no
        gates.
        """
        return torch.arange(self.gate.num_gates) if self.granularity in VECTOR_GRANULARITIES else None

    def to_dense(self) -> nn.Module:
        """A plain ``torch.nn`` layer that computes what this one computes in evaluation mode."""
        raise NotImplementedError


class GatedWeight(GatedLayer):
    """A layer with one gated weight (written, read / groups, *kernel) and a bias: linear layers and convolutions.

    It is mixed in before the ``torch.nn`` layer in ``_dense``.

    Attributes:
        index: for granularity "index" the gate of each weight, int64 of the weight's shape; else None. It is not in the
            ``state_dict``.
        _arguments: the arguments of the dense constructor that its instances keep as attributes.
    """

    weight: Tensor
    bias: Any
    index: Tensor | None
    training: bool
    groups: int = 1
    _dense: type[nn.Module]
    _arguments: tuple[str, ...]

    @classmethod
    def _gate_count(
        cls,
        granularity: Any,
        per_sample: bool,
        written: int,
        read: int,
        groups: int = 1,
        kernel: Sequence[int] = (),
        gate: Any = None,
    ) -> int:
        """How many gates a layer of these sizes has.

        Args:
            granularity: as in the constructor of the layer.
            per_sample: whether gates are drawn for each sample.
            written, read: the numbers of output and input channels.
            groups, kernel: the groups and the kernel size of a convolution.
            gate: an instance with more gates than ``granularity`` as an index names is allowed; other layers may use
                those.

        Raises: ValueError for a granularity that does not exist, or that cannot be drawn for each sample.
        """
        if isinstance(granularity, Tensor):
            if per_sample:
                raise ValueError(
                    f"per_sample=True with an index of gates: expected granularity {list(VECTOR_GRANULARITIES)} with it"
                )
            least = gate.num_gates if isinstance(gate, Gate) else 0
            return max(least, _checks.gate_index("granularity", granularity, (written, read // groups, *kernel)))
        if per_sample and granularity not in VECTOR_GRANULARITIES:
            raise ValueError(
                f"per_sample=True with granularity={granularity!r}: expected one of {list(VECTOR_GRANULARITIES)} with "
                "it"
            )
        if isinstance(granularity, tuple):
            return _checks.block_count("granularity", granularity, written, read // groups)
        counts = {"output": written, "input": read, "weight": written * (read // groups) * math.prod(kernel)}
        if not isinstance(granularity, str) or granularity not in counts:
            raise ValueError(
                f"granularity={granularity!r}: expected 'output', 'input', 'weight', a tuple (rows, cols) or an int64 "
                "tensor"
            )
        return counts[granularity]

    def _set_granularity(self, granularity: Granularity | Tensor) -> None:
        """Set ``granularity`` and ``index`` from the argument of the constructor."""
        if isinstance(granularity, Tensor):
            index = granularity.detach() if self.weight.is_meta else granularity.detach().to(self.weight.device)
            self.granularity = "index"
        else:
            index, self.granularity = None, granularity
        nn.Module.register_buffer(cast(nn.Module, self), "index", index, persistent=False)

    def _gates_by_index(self) -> tuple[Tensor, Tensor | None, GateSpec]:
        """(parameter, seed, spec) with one entry for each weight, as fused operators take them.

        If gates are random, several weights share a draw, so the drawn values are passed and no seed.
        """
        assert self.index is not None
        if self.gate.spec.rule == SAMPLE:
            return self.gate()[self.index.flatten()], None, VALUE
        parameter, seed, spec = self.gate.call()
        return parameter[self.index.flatten()], seed, spec

    @classmethod
    def gates_for(
        cls, layer: Any, granularity: Granularity | Tensor, per_sample: bool = False, gate: Any = None
    ) -> int:
        """How many gates a dense ``layer`` would have. Raises ValueError as :meth:`_gate_count` does."""
        groups, (written, read, *kernel) = getattr(layer, "groups", 1), layer.weight.shape
        return cls._gate_count(granularity, per_sample, written, read * groups, groups, kernel, gate)

    @classmethod
    def _from_dense(
        cls,
        layer: nn.Module,
        gate: GateLike,
        granularity: Granularity | Tensor,
        per_sample: bool,
    ) -> Any:
        """A gated layer with the parameters of ``layer`` themselves, divided by fresh gates that are not 1.

        Raises: ValueError if a fresh gate is 0.
        """
        gated = cls._around(layer, gate, granularity, per_sample)
        gated._undo_fresh_gates()
        return gated

    @classmethod
    def _around(
        cls,
        layer: nn.Module,
        gate: GateLike,
        granularity: Granularity | Tensor,
        per_sample: bool,
    ) -> Any:
        """:meth:`_from_dense` without the division.

        The layer is built on the meta device, so no second weight is allocated and no random number drawn.
        """
        check_dense(layer, cls._dense)
        per_sample = _checks.flag("per_sample", per_sample)
        arguments = {name: getattr(layer, name) for name in cls._arguments}
        weight: Any = layer.weight
        bias: Any = layer.bias
        count = cls.gates_for(layer, granularity, per_sample, gate)
        granularity = granularity.to(weight.device) if isinstance(granularity, Tensor) else granularity
        how: dict[str, Any] = {
            "gate": make_gate(gate, count, weight.device),
            "granularity": granularity,
            "per_sample": per_sample,
        }
        build: Any = cls
        gated = build(**arguments, bias=bias is not None, device="meta", dtype=weight.dtype, **how)
        gated.weight, gated.bias = weight, bias
        return gated.train(layer.training)

    @torch.no_grad()
    def _undo_fresh_gates(self) -> None:
        """Divide weight and bias by fresh gates that are not 1. Raises ValueError if one is 0."""
        if self.gate.starts_at_one():
            return
        z = fresh_values(self.gate)
        if not bool((z != 0).all()):
            raise ValueError(
                f"gate={type(self.gate).__name__}: a fresh gate of it is 0, so what the layer computes could not be "
                "kept"
            )
        self.weight.data = (self.weight / self._spread(z)).to(self.weight.dtype)
        if self.bias is not None and self.granularity == "output":
            self.bias.data = (self.bias / z).to(self.bias.dtype)

    @torch.no_grad()
    @settled
    def to_dense(self) -> nn.Module:
        """A plain ``torch.nn`` layer that computes what this one computes in evaluation mode; parameters are copies."""
        arguments = {name: getattr(self, name) for name in self._arguments}
        dense: Any = self._dense(**arguments, bias=self.bias is not None, device="meta", dtype=self.weight.dtype)
        z = self.gate.deterministic()
        weight = self.weight * self._spread(z)
        dense.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias * z if self.granularity == "output" else self.bias.clone()
            dense.bias = nn.Parameter(bias.to(self.bias.dtype), requires_grad=self.bias.requires_grad)
        plain: nn.Module = dense.train(self.training)
        return plain

    def _open_range(self) -> slice | None:
        """The indices of the open gates as one slice, so that the layer can compute on this slice of its weight alone.

        Only a family that keeps its open gates side by side (DAM) has such a slice. None for other families; if the
        gates are not a vector; for a convolution with groups; if all gates or no gates are open; on a GPU, where asking
        would wait for the device; and while operators are counted, traced or transformed, because these must see the
        whole layer.
        """
        find = self.gate.open_slice
        if find is None or self.granularity not in VECTOR_GRANULARITIES or self.groups != 1:
            return None
        if needs_dispatcher((), by_profiler=False) or self.weight.device.type != "cpu":
            return None
        start, stop = find()
        return slice(start, stop) if 0 < stop - start < self.gate.num_gates else None

    def _spread(self, values: Tensor) -> Tensor:
        """``values``, one per gate (num_gates,), as a tensor that broadcasts to the weight."""
        written, read, *kernel = self.weight.shape
        ones = [1] * len(kernel)
        if self.granularity == "output":
            return values.view(written, 1, *ones)
        if self.index is not None:
            return values[self.index]
        if self.granularity == "weight":
            return values.view(self.weight.shape)
        if self.granularity == "input":
            return (
                values.view(self.groups, 1, read)
                .expand(self.groups, written // self.groups, read)
                .reshape(written, read, *ones)
            )
        assert isinstance(self.granularity, tuple)
        return expand_blocks(values, (written, read), self.granularity).reshape(written, read, *ones)

    def _collect(self, t: Tensor) -> Tensor:
        """Sums of ``t``, of the weight's shape, over the weights of each gate: (num_gates,)."""
        if self.granularity == "output":
            return t.flatten(1).sum(1)
        owner = self._spread(torch.arange(self.gate.num_gates, device=t.device)).expand(t.shape)
        return t.new_zeros(self.gate.num_gates).index_add(0, owner.reshape(-1), t.reshape(-1))

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """(the output channels, the input channels) all of whose weights have closed gates."""
        shut = ~self.gate.is_open()
        if self.granularity == "output":
            return set(shut.nonzero().flatten().tolist()), set()
        if self.granularity == "input":
            return set(), set(shut.nonzero().flatten().tolist())
        grid = (
            self._spread(shut).expand(self.weight.shape).flatten(2).all(2)
            if self.weight.dim() > 2
            else self._spread(shut)
        )
        by_group = grid.view(self.groups, -1, grid.shape[1])  # (groups, written / groups, read / groups)
        return set(grid.all(1).nonzero().flatten().tolist()), set(
            by_group.all(1).flatten().nonzero().flatten().tolist()
        )

    def group_size(self) -> float | Tensor:
        """|g|, how many parameters a gate switches off, with the bias where the gate multiplies it.

        A number if it is the same for all gates, else (num_gates,).
        """
        if self.index is not None:
            return torch.bincount(self.index.flatten(), minlength=self.gate.num_gates)
        written, read = self.weight.shape[:2]
        positions = self.weight.shape[2:].numel()
        if self.granularity == "output":
            return read * positions + (self.bias is not None)
        if self.granularity == "input":
            return written // self.groups * positions
        if not isinstance(self.granularity, tuple):
            return 1
        sides = [
            torch.tensor([min(step, size - start) for start in range(0, size, step)], device=self.weight.device)
            for size, step in zip((written, read), self.granularity, strict=True)
        ]
        return torch.outer(*sides).flatten() * positions

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        cost: float | Tensor = lam * self.group_size()
        ungated: float | Tensor = 0.0
        if prior_precision:
            refresh(cast(nn.Module, self))
            squares = self._collect(wide_dtype(self.weight).square())
            bias = None if self.bias is None else wide_dtype(self.bias).square()
            if bias is not None and self.granularity == "output":
                squares = squares + bias
            elif bias is not None:
                ungated = 0.5 * prior_precision * bias.sum()
            cost = cost + 0.5 * prior_precision * squares
        total: Tensor = (self.gate.open_probability() * cost).sum() + ungated
        return total

    def _describe_gates(self) -> str:
        return f"granularity={self.granularity!r}, per_sample={self.per_sample}"


def fresh_values(gate: Gate) -> Tensor:
    """The evaluation values of fresh gates, (num_gates,), to divide parameters by.

    Raises: ValueError on the meta device, where there are no values.
    """
    z = gate.deterministic()
    if z.is_meta:
        raise ValueError(
            f"gate={type(gate).__name__}: fresh gates are not 1, and parameters on the meta device cannot make up for "
            "them"
        )
    return z


def wide_dtype(t: Tensor) -> Tensor:
    """``t`` in float32 or wider, so that sums of squares do not overflow; a DTensor is gathered."""
    if hasattr(t, "full_tensor"):
        t = t.full_tensor()
    return t.to(torch.promote_types(t.dtype, torch.float32))
