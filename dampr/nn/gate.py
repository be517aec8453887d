"""Gate, GatedResidual and GatedEmbedding: gates on any dimension of an activation, on a whole branch,
on a table of embeddings.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from dampr import _checks, functional, reference
from dampr.functional.gates import gated_dimension, times_rows
from dampr.gates import Gate as Family
from dampr.gates import make_gate, place_gate, ranks
from dampr.ops import is_transformed
from dampr.spec import HARD_CONCRETE, RAMP, value

from .base import VECTOR_GRANULARITIES, GatedLayer, fresh_values, wide_dtype
from .computed import check_dense, computed, copied, refresh, settled

VALUE = value()
_SCALABLE = (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm, nn.GroupNorm)
FLAT_AT_ZERO = (HARD_CONCRETE, RAMP)  # families whose derivative is 0 where the gate is


class Scale(nn.Module):
    """y = x * scale along dimension ``dim``: what is left of a :class:`Gate` when it is
    compacted and its values are not all 1.

    ``scale`` is a buffer, (x.shape[dim],).
    """

    scale: Tensor

    def __init__(self, scale: Tensor, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", scale)

    @property
    def num_features(self) -> int:
        """The size of that dimension."""
        return self.scale.numel()

    def forward(self, x: Tensor) -> Tensor:
        return (x * reference.along(self.scale, x, self.dim)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}"


class Gate(GatedLayer, nn.Module):
    """Learned gates on one dimension of any activation: y = x * z along ``dim``.

    Args:
        num_gates: how many gates; without ``index`` the size of that dimension.
        dim: the dimension of the input that has the gates; negative counts from the end.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.
        index: which gate each element of the dimension has, int64, (x.shape[dim],), values in [0, num_gates):
            any grouping. None: its own.
        device: where the gates live.

    ``weights_per_gate`` is what closing one element of the dimension saves, for the penalty; 1 unless set. A gate of
    several elements counts for all of them.

    Not to be confused with :class:`dampr.gates.Gate`, the interface of the families:
    an instance of that is this layer's ``gate``.

    Raises: ValueError or TypeError that names the argument.

    >>> layer = Gate(2, dim=-1, index=torch.tensor([0, 0, 1])).eval()
    >>> layer.gate.log_alpha.data[0] = -9.0
    >>> layer(torch.ones(1, 3))
    tensor([[0., 0., 1.]], grad_fn=<_GateActivationsBackward>)
    """

    index: Tensor | None

    def __init__(
        self,
        num_gates: int,
        dim: int = 1,
        *,
        gate: str | type[Family] | Family = "hard_concrete",
        per_sample: bool = False,
        index: Tensor | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        num_gates = _checks.positive_int("num_gates", num_gates)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim={dim!r}: expected an integer")
        if _checks.flag("per_sample", per_sample) and dim == 0:
            raise ValueError("per_sample=True with dim=0: expected the gates on another dimension than the samples")
        if index is not None:
            _check_index(index, num_gates)
            index = index.detach().to(device) if device is not None else index.detach()
        self.granularity = "output"
        self.dim = dim
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.weights_per_gate = 1.0
        self.register_buffer("index", index, persistent=False)
        where = device if index is None else index.device
        self.gate = place_gate(gate, num_gates, where, self.per_sample and index is None)

    def forward(self, x: Tensor) -> Tensor:
        if self.sharded:
            from . import sharded  # loads torch.distributed.tensor

            each = self.gate(x.shape[0]) if self.per_sample and self.gate.draws else self.gate()
            each = each if self.index is None else each[..., self.index]
            return sharded.times(x, reference.along(each, x, self.dim % x.dim()))
        if self.index is None:
            parameter, seed, spec = self.gate.call()
            offset = self.gate.index_offset(x.shape[0]) if self.per_sample and seed is not None else 0
            how: dict[str, Any] = {"seed": seed, "per_sample": self.per_sample, "spec": spec, "index_offset": offset}
            return functional.gate_activations(x, parameter, dim=self.dim, **how)
        if not (self.per_sample and self.gate.draws):
            return functional.gate_activations(x, self.gate()[self.index], dim=self.dim, spec=VALUE)
        dim = gated_dimension(x, self.dim, per_sample=True)
        return times_rows(x, self.gate(x.shape[0])[:, self.index], dim)

    @property
    def num_features(self) -> int:
        """The size of the dimension."""
        return self.gate.num_gates if self.index is None else self.index.numel()

    def _each(self, values: Tensor) -> Tensor:
        """One value per gate as one per element of the dimension."""
        return values if self.index is None else values[self.index]

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        total: Tensor = lam * self.weights_per_gate * self._each(self.gate.open_probability()).sum()
        return total

    def channel_gates(self) -> Tensor:
        return torch.arange(self.gate.num_gates) if self.index is None else self.index.cpu()

    def closed_channels(self) -> tuple[set[int], set[int]]:
        return set(self._each(~self.gate.is_open()).nonzero().flatten().tolist()), set()

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """``nn.Identity`` where every gate is 1 in evaluation mode, else a :class:`Scale` with the values."""
        z = self._each(self.gate.deterministic())
        plain = nn.Identity() if bool((z == 1).all()) else Scale(z.clone(), self.dim)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        grouped = "" if self.index is None else f", index of {self.index.numel()}"
        return f"dim={self.dim}, per_sample={self.per_sample}{grouped}"


def _check_index(index: Any, num_gates: int) -> None:
    if _checks.tensor("index", index).dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"index: got {index.dtype} of shape {tuple(index.shape)}, expected int64 of shape (x.shape[dim],)"
        )
    if index.numel() and not index.is_meta and not 0 <= int(index.min()) <= int(index.max()) < num_gates:
        raise ValueError(
            f"index: its values are in [{int(index.min())}, {int(index.max())}], expected [0, {num_gates}), the gates"
        )


class Residual(nn.Module):
    """y = x + scale * branch(x), the plain form of :class:`GatedResidual`; ``scale`` is a buffer of one element,
    or None for 1.
    """

    scale: Tensor | None

    def __init__(self, branch: nn.Module, scale: Tensor | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.branch(x, *args, **kwargs)
        return x + y if self.scale is None else _add(x, y, self.scale)


class GatedResidual(GatedLayer, nn.Module):
    """A residual branch with a learned gate: y = x + z F(x).

    Args:
        branch: F, any module whose output is added to its first argument; further arguments are handed on.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance with one gate to share.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.
        device: where the gate lives; None: where the parameters of ``branch`` do.

    A closed branch is not run: in evaluation never (the output is then ``x`` itself), and in training, on the CPU, when
    the draw is 0 and the family's gradient there is 0 too (hard concrete, ramps). Parameters of a branch that was not
    run get no gradient in that step (under DistributedDataParallel, which waits for one, zeros), and its BatchNorms see
    no batch. Where several ranks draw per sample outside of such a wrapper, every branch is run, because the ranks have
    to agree. On a GPU the draw is not waited for, and under ``torch.compile`` and ``torch.func`` no branch is left out.

    The penalty counts the parameters of the branch (those of gates inside excepted).

    Raises: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        branch: nn.Module,
        *,
        gate: str | type[Family] | Family = "hard_concrete",
        per_sample: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branch={branch!r:.80}: expected a torch.nn.Module")
        if device is None:
            device = next((p.device for p in branch.parameters()), None)
        self.branch = branch
        self.granularity = "output"
        self.per_sample = _checks.flag("per_sample", per_sample)
        self.gate = make_gate(gate, 1, device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sample_dim = 0 if self.per_sample else None
        if self.sharded:
            from . import sharded  # loads torch.distributed.tensor

            z = self.gate(x.shape[0]) if self.per_sample and self.gate.draws else self.gate()
            branch = self.branch(x, *args, **kwargs)
            return x + sharded.times(branch, z.view(-1, *[1] * (branch.dim() - 1)))
        return gated_sum(x, lambda: self.branch(x, *args, **kwargs), self.gate, self.training, sample_dim, self.branch)

    def _weights(self) -> list[Tensor]:
        gates = {id(p) for module in self.branch.modules() if isinstance(module, Family) for p in module.parameters()}
        return [p for p in self.branch.parameters() if id(p) not in gates]

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        weights = self._weights()
        cost: float | Tensor = lam * sum(p.numel() for p in weights)
        for p in weights if prior_precision else ():
            cost = cost + 0.5 * prior_precision * wide_dtype(p).square().sum()
        total: Tensor = (self.gate.open_probability() * cost).sum()
        return total

    def channel_gates(self) -> None:
        """None: the gate is that of the branch."""

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """Nothing: an open or closed branch leaves every channel of the sum as it is."""
        return set(), set()

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """``nn.Identity`` when the branch is closed, else :class:`Residual`: x + F(x), with a copy of the branch.

        A gate that is not 1 goes into the weight and bias of the linear, convolution or norm layer that ends the branch
        (the last of a ``Sequential``, or the branch itself); where there is none, it stays as the constant ``scale``.
        Gated layers inside the branch become plain as well.
        """
        plain = self.without_gate()
        for name, module in reversed(list(plain.named_modules())):
            if isinstance(module, GatedLayer):
                parent, _, child = name.rpartition(".")
                setattr(plain.get_submodule(parent), child, module.to_dense())
        return plain

    @torch.no_grad()
    def without_gate(self) -> nn.Module:
        """:meth:`to_dense` that leaves the gated layers inside the branch gated."""
        z = self.gate.deterministic()
        if not bool(z != 0):
            return nn.Identity().train(self.training)
        branch = copied(self.branch)
        scale = None if bool(z == 1) or _scale_last(branch, z) else z.clone()
        return Residual(branch, scale).train(self.training)

    def extra_repr(self) -> str:
        return f"per_sample={self.per_sample}"


def gated_sum(
    x: Tensor,
    branch: Callable[[], Tensor],
    gate: Family,
    training: bool,
    sample_dim: int | None = None,
    owner: nn.Module | None = None,
) -> Tensor:
    """x + z branch(), of which :class:`GatedResidual` says when the branch is not run.

    ``gate`` holds one gate. In training, each index of dimension ``sample_dim`` of ``x`` has a draw of its own; None:
    there is one draw. ``owner`` has the parameters of the branch.
    """
    seen = not torch.compiler.is_compiling() and not is_transformed()  # whether Python may look at a value
    if not training and seen and not bool(gate.is_open()):
        return x
    if sample_dim is not None and gate.draws:
        z = gate(x.shape[sample_dim]).view([-1 if i == sample_dim else 1 for i in range(x.dim())])
    else:
        z = gate()
    may_skip = seen and gate.spec.family in FLAT_AT_ZERO and x.device.type == "cpu"
    reduced = seen and _is_reduced(owner)
    may_skip = may_skip and (reduced or sample_dim is None or not ranks.several())
    if training and may_skip and not bool(z.detach().any()):
        y = (x + z).to(x.dtype)  # z is 0: a tensor of its own, and the graph of the gate stays connected
        idle = (
            [p for p in owner.parameters() if p.requires_grad]
            if reduced and owner is not None and y.requires_grad
            else []
        )
        return _WithIdle.apply(y, *idle) if idle else y
    return _add(x, branch(), z)


_reduced: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that have run within a DistributedDataParallel


def _is_reduced(owner: nn.Module | None) -> bool:
    """Whether a DistributedDataParallel waits for the gradients of ``owner``.

    A checkpointed region runs a second time outside of the wrapper, and has to do then what it did within.
    """
    if ranks.wrapper() is None:
        return owner in _reduced
    if owner is not None:
        _reduced.add(owner)
    return True


class _WithIdle(torch.autograd.Function):
    """``y`` itself, with a gradient of zeros for parameters that had no part in it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *idle: Tensor) -> Tensor:
        ctx.save_for_backward(*idle)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*grads, *(torch.zeros_like(p) for p in ctx.saved_tensors))


def _add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + z y, with the product formed in the precision of the gate, in the dtype of x + y."""
    return torch.addcmul(x, y, z).to(torch.promote_types(x.dtype, y.dtype))


def _scale_last(branch: nn.Module, z: Tensor) -> bool:
    """Multiply the layer that ends ``branch`` by ``z``; False, and nothing changed,
    where it ends in none or that one is used twice.
    """
    last = branch
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    weight = getattr(last, "weight", None)
    if not isinstance(last, _SCALABLE) or not isinstance(weight, nn.Parameter) or computed(last) is not None:
        return False
    if [p is weight for _, p in branch.named_parameters(remove_duplicate=False)].count(True) != 1:
        return False
    for p in (weight, last.bias):
        if p is not None:
            p.data = (p * z).to(p.dtype)
    return True


class GatedEmbedding(GatedLayer, nn.Embedding):
    """``nn.Embedding`` with learned gates on its columns (the width) or on its rows (the vocabulary).

    Args:
        num_embeddings ... dtype: as in ``nn.Embedding``.
        gate: a family's name, a :class:`dampr.gates.Gate` subclass, or an instance to share.
        granularity: ``"output"``, a gate per column of the table, or ``"input"``, a gate per row:
            a closed row makes zeros of its word.
        per_sample: in training, one draw for each index of the first dimension of the input instead of one per call.

    Gates multiply the rows that were looked up, never the table, so that a step costs what its words cost and
    ``sparse=True`` works. ``weight`` comes first in ``parameters()``; a dense ``state_dict`` loads and leaves the gates
    as they are. A fresh layer equals the dense one in evaluation mode, to the bit.

    Raises: ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gate: str | type[Family] | Family = "hard_concrete",
        granularity: str = "output",
        per_sample: bool = False,
    ) -> None:
        _checks.one_of("granularity", granularity, VECTOR_GRANULARITIES)
        arguments = padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight, _freeze, device, dtype
        super().__init__(num_embeddings, embedding_dim, *arguments)
        self.granularity = granularity
        self.per_sample = _checks.flag("per_sample", per_sample)
        if granularity == "output":
            self.gate = place_gate(gate, embedding_dim, self.weight.device, self.per_sample)
        else:  # by values, whose noise need not come from a kernel
            self.gate = make_gate(gate, num_embeddings, self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        if self.sharded:
            return self._on_shards(rows, input)
        if self.granularity == "output":
            parameter, seed, spec = self.gate.call()
            offset = self.gate.index_offset(rows.shape[0]) if self.per_sample and seed is not None else 0
            how: dict[str, Any] = {"seed": seed, "per_sample": self.per_sample, "spec": spec, "index_offset": offset}
            return functional.gate_activations(rows, parameter, dim=-1, **how)
        if self.per_sample and self.gate.draws:
            words = input.shape[0]
            z = self.gate(words).gather(1, input.reshape(words, -1).long()).flatten()
        else:
            z = self.gate()[input.flatten()]
        flat = rows.reshape(-1, self.embedding_dim)
        return functional.gate_activations(flat, z, dim=0, spec=VALUE).view(rows.shape)

    def _on_shards(self, rows: Tensor, input: Tensor) -> Tensor:
        from . import sharded  # loads torch.distributed.tensor

        drawn = self.per_sample and self.gate.draws
        z = self.gate(input.shape[0]) if drawn else self.gate()
        if self.granularity == "output":
            return sharded.times(rows, z.view(-1, *[1] * (rows.dim() - 2), z.shape[-1]) if drawn else z)
        words = sharded.whole(input)
        z = z.gather(1, words.reshape(len(words), -1).long()).view(words.shape) if drawn else z[words]
        return sharded.times(rows, z.unsqueeze(-1))

    @classmethod
    def gates_for(cls, layer: nn.Embedding, granularity: str = "output") -> int:
        """How many gates a dense ``layer`` would have."""
        return layer.num_embeddings if granularity == "input" else layer.embedding_dim

    @classmethod
    def from_dense(
        cls,
        layer: nn.Embedding,
        *,
        gate: str | type[Family] | Family = "hard_concrete",
        granularity: str = "output",
        per_sample: bool = False,
    ) -> GatedEmbedding:
        """A gated layer with the very parameter of ``layer``, not a copy.
        Raises TypeError unless its type is exactly ``nn.Embedding``.

        Where fresh gates are not 1, the table is divided by them, so that the layer computes the same; ValueError where
        one is 0, or where ``max_norm`` would undo it.
        """
        check_dense(layer, nn.Embedding)
        _checks.one_of("granularity", granularity, VECTOR_GRANULARITIES)
        own = make_gate(gate, cls.gates_for(layer, granularity), layer.weight.device)
        how: dict[str, Any] = {"gate": own, "granularity": granularity, "per_sample": per_sample}
        gated = cls(**_table(layer), _weight=layer.weight.detach(), **how)
        gated.weight = layer.weight
        gated.train(layer.training)
        if not own.starts_at_one():
            z = fresh_values(own).detach()
            if layer.max_norm is not None or not bool((z != 0).all()):
                why = "max_norm would undo it" if layer.max_norm is not None else "some are 0"
                raise ValueError(
                    f"gate={type(own).__name__}: fresh gates are not 1, and the table cannot make up for it, because "
                    f"{why}"
                )
            gated.weight.data = (gated.weight.detach() / gated._spread(z)).to(gated.weight.dtype)
        return gated

    def _spread(self, values: Tensor) -> Tensor:
        """One value per gate as something that broadcasts to the table."""
        return values.view(-1, 1) if self.granularity == "input" else values

    @torch.no_grad()
    @settled
    def to_dense(self) -> nn.Module:
        """The ``nn.Embedding`` that computes what this layer computes in evaluation mode, with a copy of the table.

        The norms that ``max_norm`` limits are then those of the gated rows, and were those of the ungated ones.
        """
        table = (self.weight * self._spread(self.gate.deterministic())).to(self.weight.dtype)
        plain = nn.Embedding(**_table(self), _weight=table, _freeze=not self.weight.requires_grad)
        return plain.train(self.training)

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        along = 1 if self.granularity == "input" else 0
        cost: float | Tensor = lam * self.weight.shape[along]
        if prior_precision:
            refresh(self)
            cost = cost + 0.5 * prior_precision * wide_dtype(self.weight).square().sum(along)
        total: Tensor = (self.gate.open_probability() * cost).sum()
        return total

    def channel_gates(self) -> Tensor | None:
        """Those of the columns; rows are words, which the caller counts."""
        return torch.arange(self.embedding_dim) if self.granularity == "output" else None

    def closed_channels(self) -> tuple[set[int], set[int]]:
        shut = set((~self.gate.is_open()).nonzero().flatten().tolist())
        return (set(), shut) if self.granularity == "input" else (shut, set())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity!r}, per_sample={self.per_sample}"


def _table(layer: nn.Embedding) -> dict[str, Any]:
    """The arguments of a layer, the table itself excepted."""
    names = "num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"
    return {name: getattr(layer, name) for name in names}
