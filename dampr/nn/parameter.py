"""GatedParameter: gates on one dimension of any parameter, whatever the module around it computes.

:func:`put_on` gives the module a class of its own in which the parameter is a property: reading ``module.weight``
returns the parameter times its gates, so the forward needs no change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks
from dampr.gates import GateLike, make_gate

from .base import GatedLayer, fresh_values


class GatedParameter(GatedLayer, nn.Module):
    """Multiplies a parameter along one dimension by gates.

    :func:`dampr.convert` puts it on the weights that read a unit, in models whose layers have no gated counterpart. A
    closed gate zeroes what these weights read of its unit, so nothing after them depends on the unit.

    Args:
        gate: the gates; other parameters may share them.
        dim: the dimension of the parameter.
        index: int64, for each index of that dimension its gate, or -1 for none.
        weights_per_gate: the number of parameters that closing each gate saves, (gates,), for the penalty; None: the
            elements of this parameter that the gate multiplies.
        device: the device of the gates.

    It can also be registered with ``torch.nn.utils.parametrize``.

    >>> gated = GatedParameter("hard_concrete", 0, torch.tensor([0, 0, 1, -1])).eval()
    >>> gated.gate.log_alpha.data[0] = -9
    >>> gated(torch.ones(4, 2)).any(1)
    tensor([False, False,  True,  True])
    """

    weights_per_gate: Tensor | None
    index: Tensor

    def __init__(
        self,
        gate: GateLike,
        dim: int,
        index: Tensor,
        *,
        weights_per_gate: Tensor | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if (
            not isinstance(index, Tensor)
            or index.dtype != torch.int64
            or index.dim() != 1
            or not index.numel()
            or int(index.min()) < -1
        ):
            raise ValueError(
                f"index={index!r:.80}: expected int64 of one dimension, with the number of a gate or -1 for each "
                "element"
            )
        count = int(index.max()) + 1
        _checks.positive_int("index.max() + 1", count)
        self.gate = make_gate(gate, count, device)
        self.dim, self.granularity, self.per_sample = dim, "units", False
        self.register_buffer("index", index.to(device), persistent=False)
        self.weights_per_gate = weights_per_gate
        self._size = 1  # the number of elements at one index of ``dim``, of the parameter in the last call

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` times its gates, in the dtype of ``weight``.

        weight: of any shape with weight.shape[dim] equal to the length of ``index``.
        """
        self._size = weight.numel() // weight.shape[self.dim]
        if self.sharded:
            from . import sharded  # loads torch.distributed.tensor

            return sharded.times(weight, self._along(self.gate(), weight.dim()))
        return (weight * self._along(self.gate(), weight.dim())).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The parameter to store so that its product with fresh gates is ``weight``. Raises ValueError if a fresh gate
        is 0.
        """
        self._size = weight.numel() // weight.shape[self.dim]
        if self.gate.starts_at_one():
            return weight
        with torch.no_grad():
            z = fresh_values(self.gate)
            if not bool((z != 0).all()):
                raise ValueError(
                    f"gate={type(self.gate).__name__}: a fresh gate of it is 0, so what the layer computes could not "
                    "be kept"
                )
            return (weight / self._along(z, weight.dim())).to(weight.dtype)

    def _along(self, values: Tensor, rank: int) -> Tensor:
        """``values``, one per gate, as a tensor that broadcasts to a parameter of this rank; 1 for an index without a
        gate.
        """
        spread = torch.cat([values, values.new_ones(1)])[self.index]
        return spread.view([-1 if at == self.dim else 1 for at in range(rank)])

    def group_size(self) -> Tensor:
        """How many weights each gate switches off, (gates,)."""
        if self.weights_per_gate is not None:
            return self.weights_per_gate.to(self.index.device)
        return torch.bincount(self.index[self.index >= 0], minlength=self.gate.num_gates) * self._size

    def penalty(self, lam: float = 1.0, prior_precision: float = 0.0) -> Tensor:
        """The expected L0 penalty of the gates, a scalar.

        ValueError for a ``prior_precision``: the weights are another module's.
        """
        if prior_precision:
            raise ValueError(
                f"prior_precision={prior_precision!r}: expected 0, because gates on parameters do not know these"
            )
        return (self.gate.open_probability() * (lam * self.group_size())).sum()

    def closed_channels(self) -> tuple[set[int], set[int]]:
        """(an empty set, the indices of ``dim`` whose gates are closed)."""
        return set(), set((~self._along(self.gate.is_open(), 1 + self.dim)).flatten().nonzero().flatten().tolist())

    def channel_gates(self) -> None:
        """None: some indices may have no gate."""

    def extra_repr(self) -> str:
        return f"dim={self.dim}, gated={int((self.index >= 0).sum())} of {len(self.index)}"


def gated_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, GatedParameter]]:
    """(owner, name of the parameter, gates) of every :class:`GatedParameter` that was put on a parameter in
    ``model``.
    """
    for module in model.modules():
        for name in _gated_names(module):
            chain: Any = module._modules[name + _GATES]
            for gates in chain:
                yield module, name, gates


def put_on(module: nn.Module, name: str, gates: GatedParameter, *, divided: bool = True) -> None:
    """Put gates on the parameter ``name`` of a module; a parameter may have several.

    Reading the attribute then returns the product with all its gates. The parameter keeps its name and is the same
    object. The module gets a class of its own, in which the parameter is a property, and the gates as children: those
    of "weight" are in "weight_gates".

    ``divided``: whether to divide the parameter by fresh gates that are not 1; of a parameter with several names, one
    call does.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    if divided:
        with torch.no_grad():
            parameter.data = gates.right_inverse(parameter).detach()
    give_property(module, name)
    chain: Any = module._modules[name + _GATES]
    chain.append(gates)


def give_property(module: nn.Module, name: str) -> None:
    """Make reading the parameter ``name`` return the product with its gates, of which there are none yet."""
    names = _gated_names(module)
    if name not in names:
        module.add_module(name + _GATES, nn.ModuleList().train(module.training))
        _give_class(module, _plain_class(module), [*names, name])


def take_off(module: nn.Module, name: str, *, folded: bool) -> None:
    """Remove the gates from the parameter ``name``.

    ``folded``: replace the parameter by a new one, times its gates in evaluation; else leave it as it is.
    """
    parameter, chain = module._parameters[name], module._modules[name + _GATES]
    assert parameter is not None
    assert chain is not None
    if folded:
        with torch.no_grad(), _evaluating(chain):
            value = getattr(module, name).detach().clone()
        module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    del module._modules[name + _GATES]
    _give_class(module, _plain_class(module), [own for own in _gated_names(module) if own != name])
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


@contextlib.contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """A block without gates on the parameters in ``model``, so that parameters can be replaced; afterwards the same
    gates are on them again.
    """
    taken: list[tuple[nn.Module, tuple[str, ...], list[nn.Module | None]]] = []
    for module in list(model.modules()):
        names = _gated_names(module)
        if names:
            taken.append((module, names, [module._modules.pop(name + _GATES) for name in names]))
            _give_class(module, _plain_class(module), ())
    try:
        yield
    finally:
        for module, names, chains in taken:
            module._modules.update(zip((name + _GATES for name in names), chains, strict=True))
            _give_class(module, type(module), names)


def is_on(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module has gates."""
    return name in _gated_names(module)


_GATES = "_gates"  # at the end of the name of the child that holds the gates of a parameter
OPEN_STATISTICS = "open_statistics"  # the name of the child that makes a norm count only open elements


class _WithGates:
    """Mixed into the class of a module with gates on its parameters, whose names are in ``_gated_names``."""

    _gated_names: tuple[str, ...] = ()

    def __delattr__(self, name: str) -> None:
        if name in self._gated_names:
            raise _not_replaced(name, self)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Any) -> None:
        """As in ``torch.nn``; ``torch.nn.utils.prune`` would register the product here, and is refused by name."""
        own = name.removesuffix("_orig")
        if own in self._gated_names and isinstance(param, Tensor) and not isinstance(param, nn.Parameter):
            raise _not_replaced(own, self)
        super().register_parameter(name, param)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = super().__getstate__() if isinstance(self, nn.RNNBase) else vars(self)
        return _rebuilt, (_plain_class(self), self._gated_names), dict(state)


# the recurrent layer whose forward runs in this thread, and the products of its call
_RUNNING: ContextVar[tuple[Any, list[Tensor]]] = ContextVar("_RUNNING", default=(None, []))


class _RecurrentWithGates(_WithGates):
    """:class:`_WithGates` for recurrent layers of torch.

    Such a layer computes with the list ``_flat_weights`` of its parameters, not with its attributes. So during a call
    this list holds the products of the parameters and their gates.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, during which ``_flat_weights`` holds the products of parameters and gates.

        Outside of the call, and in other threads, the list holds the parameters.
        """
        names: list[str] = vars(self)["_flat_weights_names"]
        token = _RUNNING.set((self, recurrent_weights([getattr(self, name) for name in names])))
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _RUNNING.reset(token)

    @property
    def _flat_weights(self) -> Any:
        """The list of weights with which torch computes: products during a call, else the parameters."""
        module, products = _RUNNING.get()
        return products if module is self else vars(self)["_flat_weights"]

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        vars(self)["_flat_weights"] = weights

    def _weights_have_changed(self) -> bool:
        """False: the list is new in each call."""
        return False

    def _init_flat_weights(self) -> None:
        """Fill the list ``_flat_weights`` with the parameters themselves."""
        held: Any = vars(self)
        held["_flat_weights"] = [held["_parameters"].get(name) for name in held["_flat_weights_names"]]
        held["_flat_weight_refs"] = [None] * len(held["_flat_weights"])


def recurrent_weights(weights: list[Tensor]) -> list[Tensor]:
    """The weights of a recurrent layer, in the order of its list; on a GPU as views of one buffer, matrices before
    biases.

    cuDNN wants this layout; with any other it copies the weights in each call and warns.
    """
    if not weights[0].is_cuda:
        return weights
    order = sorted(range(len(weights)), key=lambda i: weights[i].dim() == 1)
    buffer = torch.cat([weights[i].reshape(-1) for i in order])
    views = buffer.split([weights[i].numel() for i in order])
    placed = {i: view.view(weights[i].shape) for i, view in zip(order, views, strict=True)}
    return [placed[i] for i in range(len(weights))]


def _gated_names(module: Any) -> tuple[str, ...]:
    """The names of the parameters of a module that have gates."""
    return module._gated_names if isinstance(module, _WithGates) else ()


def _plain_class(module: Any) -> type[nn.Module]:
    """The class of a module before it got gates on its parameters."""
    return _without_gates(type(module))


def _without_gates(kind: type) -> Any:
    """The class below the one with the gates. A class that torch has derived from that one since (``parametrize``,
    ``fully_shard``) is derived from the plain one.
    """
    if not issubclass(kind, _WithGates):
        return kind
    if "_gated_names" in vars(kind):
        return kind.__bases__[1]
    content = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__, tuple(map(_without_gates, kind.__bases__)), content)


def _rebuilt(kind: type[nn.Module], names: list[str]) -> nn.Module:
    """An empty module of the right class, for pickle and ``copy``, which fill in its attributes."""
    module = kind.__new__(kind)
    _give_class(module, kind, names)
    return module


def _give_class(module: nn.Module, kind: type[nn.Module], names: Iterable[str]) -> None:
    """Set the class of ``module``: ``kind`` itself, or a subclass in which reading the parameters ``names`` multiplies
    gates.
    """
    content: dict[str, Any] = {
        name: property(functools.partial(_product, name), functools.partial(_replace, name)) for name in names
    }
    if content and hasattr(kind, "reset_parameters"):
        content["reset_parameters"] = _reset_parameters
    mixin = _RecurrentWithGates if issubclass(kind, nn.RNNBase) else _WithGates
    module.__class__ = type(kind.__name__, (mixin, kind), content | {"_gated_names": tuple(names)}) if content else kind


def _reset_parameters(module: Any) -> None:
    """As the module's own method, which changes the parameters and neither their products nor their gates."""
    with off(module):
        module.reset_parameters()


def _replace(name: str, module: nn.Module, value: Any) -> None:
    """The property's setter. It always raises: torch handles parameters itself, and any other value would replace
    one.
    """
    raise _not_replaced(name, module)


def _not_replaced(name: str, module: Any) -> RuntimeError:
    """The error for replacing a parameter that has gates."""
    return RuntimeError(
        f"{_plain_class(module).__name__}.{name} has gates, so it stays a parameter: expected what torch.nn.utils "
        "makes of weights before dampr.convert"
    )


def _product(name: str, module: nn.Module) -> Any:
    """The property's getter: the parameter times all its gates.

    In a layer that standardises its weight, :class:`dampr.nn.OpenWeight` has the last word.
    """
    value: Any = module._parameters[name]
    chain: Any = module._modules[name + _GATES]
    if type(value).__name__ == "DTensor" and (value.device_mesh.ndim > 1 or not chain[0].sharded):
        return value  # fully_shard reads the sharded parameter itself, outside of a forward: no gates
    for gates in chain:
        value = gates(value)
    statistics: Any = module._modules.get(OPEN_STATISTICS)
    return value if statistics is None else statistics.as_read(name, value)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A block with ``module`` in evaluation mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
