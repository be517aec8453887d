"""The interface between layers and gate families."""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dampr import _checks, functional, philox
from dampr.spec import SAMPLE, GateSpec, ramp, value

from . import ranks
from .draws import Stream, share_generator
from .held import Held

_Wrapper = nn.parallel.DistributedDataParallel
VALUE_SPEC = value()
# The spec for values in [0, 1] that were drawn before: z = value, with gradient 0 where the value is 0 or 1.
BANKED = ramp("clip")


class GateModule(nn.Module):
    """A module with gate parameters.

    They stay in float32 (or float64) when a model is cast to half precision, and loading a dense checkpoint does not
    change them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GateModule:
        def keep_precision(t: Tensor) -> Tensor:
            """``fn(t)``, but float32 where that would make a half-precision gate."""
            out = fn(t)
            return (
                t.to(out.device, torch.float32)
                if out.is_floating_point() and out.dtype not in _checks.GATE_DTYPES
                else out
            )

        super()._apply(keep_precision, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # A dense checkpoint of the layer has no gates, so the gates do not change. A checkpoint whose metadata says
        # that it was made with gates, but which has no values for them, does not load. With assign=True torch adds a
        # key of its own to the metadata.
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not prefix or local_metadata.keys() - {"assign_to_params_buffers"} or own:
            super()._load_from_state_dict(state_dict | _precise(own), prefix, local_metadata, *args)


def _precise(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with half-precision gates in float32, because no gate is computed in half precision."""
    return {
        key: value.to(torch.float32)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in _checks.GATE_DTYPES
        else value
        for key, value in state.items()
    }


def _read(spec: GateSpec) -> bool:
    """Read every constant of ``spec`` before an autograd function does.

    With ``dynamic=True`` dynamo makes symbols of the constants where it first reads them. A second call could not use
    symbols that were made within an autograd function, so a gate that two layers share would not compile.
    """
    return any(constant != constant for constant in spec)


def gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter; zeros if it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Gate(GateModule):
    """A vector of learned gates; the interface of every family.

    In training mode gates may be drawn, in evaluation mode they are deterministic.

    To write a family of your own, make a subclass whose constructor takes ``(num_gates, *, device=None)`` and passes
    ``num_gates`` to this class, and override :meth:`forward` and :meth:`open_probability`. Nothing else is needed: the
    fused operators multiply by the values of ``forward()``, and their gradients flow back into it. Layers take the
    class or an instance: ``GatedLinear(8, 4, gate=SigmoidGate)``. The values of such a family are computed once per
    call, so ``per_sample=True`` of a layer has no effect, as for every family but the hard concrete ones.

    >>> class SigmoidGate(Gate):
    ...     def __init__(self, num_gates, *, device=None):
    ...         super().__init__(num_gates)
    ...         self.logit = nn.Parameter(torch.zeros(num_gates, device=device))
    ...
    ...     def forward(self, rows=None):
    ...         z = torch.sigmoid(self.logit)
    ...         return z if rows is None else z.expand(rows, -1)
    ...
    ...     def open_probability(self):
    ...         return self()
    >>> SigmoidGate(2).deterministic()
    tensor([0.5000, 0.5000], grad_fn=<SigmoidBackward0>)
    """

    num_gates: int
    # whether it draws in plain PyTorch and not in a kernel; kernels then multiply by one draw per call
    draws_once: bool = False
    former: tuple[Tensor, ...] = ()  # parameters of the gate that this one replaced; optimizers may still hold them
    in_optimizer: bool = False  # whether :func:`dampr.param_groups` gave it a learning rate of its own
    # the beginnings of the names of the parameters that :meth:`set_levels_` moves
    level_parameters: tuple[str, ...] = ()
    parameter_name: str = "parameter"  # the name of the attribute that :attr:`parameter` returns
    # returns (start, stop) of the open gates, for a family that keeps these side by side; None for others
    open_slice: Callable[[], tuple[int, int]] | None = None
    _banked: Held | None = None  # the values of every call in training, within a dampr.GateBank
    _held: Held | None = None  # the seed of every call, within dampr.hold_draws
    _stream: Stream | None = None  # of dampr.gate_generator; None: seeds come from torch's generator
    _reducer: Any = None  # of dampr.integrations.distributed.replicate_gates
    next_seed: Tensor

    def __init_subclass__(cls, **how: Any) -> None:
        super().__init_subclass__(**how)
        if "parameter" in vars(cls) and "parameter_name" not in vars(cls):
            cls.parameter_name = "parameter"

    def __init__(self, num_gates: int) -> None:
        super().__init__()
        self.num_gates = _checks.positive_int("num_gates", num_gates)

    def reset_parameters(self) -> None:
        """Set every parameter to a fresh value, as the constructor does, and restart the gate's seeds, if it has its
        own.

        A family of your own overrides this method, calls it and fills its parameters.

        Raises: NotImplementedError if a family with parameters does not override it.
        """
        if self._stream is not None:
            self._stream = Stream(self._stream.first, self._stream.group)
            self.next_seed.fill_(self._stream.first)
        if type(self).reset_parameters is Gate.reset_parameters and next(self.parameters(), None) is not None:
            raise NotImplementedError(
                f"{type(self).__name__} has no reset_parameters(), which fills its parameters with fresh values"
            )

    def starts_at_one(self) -> bool:
        """Whether every gate is 1 in evaluation. For gates on the meta device: whether fresh gates are."""
        z = self.deterministic()
        if z.is_meta:
            fresh = copy.deepcopy(self).to_empty(device="cpu")
            fresh.reset_parameters()
            z = fresh.deterministic()
        return bool((z == 1).all())

    @classmethod
    def for_layer(cls, num_gates: int, device: torch.device | str | None = None) -> Gate:
        """The gate of a layer to which this class, or its name, was given."""
        return cls(num_gates, device=device)  # type: ignore[call-arg]

    @property
    def spec(self) -> GateSpec:
        """The gate function that fused operators evaluate, in the current mode (training or evaluation).

        For a family that computes its values in :meth:`forward`, operators take these values as they are
        (:func:`dampr.spec.value`). Families that kernels know override this property.
        """
        return VALUE_SPEC

    @property
    def draws(self) -> bool:
        """Whether values are random in the current mode, so that ``forward(rows)`` gives each row its own."""
        return self.spec.rule == SAMPLE or (self.draws_once and self.training)

    @property
    def draws_in_training(self) -> bool:
        """The value of :attr:`draws` in training mode, whatever the current mode."""
        training = self.training
        self.training = True
        try:
            return self.draws
        finally:
            self.training = training

    @property
    def device(self) -> torch.device:
        """The device of the gate's parameters."""
        return next((t.device for t in itertools.chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def parameter(self) -> Tensor:
        """The gate parameters for the fused operators, (num_gates,), from which ``spec`` computes the values.

        By default these are the values of :meth:`forward` themselves.
        """
        return self.forward()

    @abstractmethod
    def forward(self, rows: int | None = None) -> Tensor:
        """Gate values: (num_gates,), or (rows, num_gates) with one draw for each row.

        They may be random in training and are deterministic in evaluation.
        """

    def deterministic(self) -> Tensor:
        """The values in evaluation, (num_gates,), whatever the current mode."""
        training = self.training
        self.eval()
        try:
            return self.forward()
        finally:
            self.train(training)

    @abstractmethod
    def open_probability(self) -> Tensor:
        """The probability that each gate is open, (num_gates,), with a graph.

        Families without a draw return a differentiable surrogate of it.
        """

    def is_open(self) -> Tensor:
        """Whether each gate is open in evaluation: bool, (num_gates,)."""
        with torch.no_grad():
            return self.deterministic() != 0

    def levels(self) -> Tensor:
        """The position of each gate, (num_gates,), without a graph: 1 for a fresh gate; at 0 and below, evaluation
        closes it.

        A budget that learns gates reads and sets levels (:meth:`set_levels_`).

        Raises: NotImplementedError for a family without levels, which such a budget cannot move.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no levels: expected levels() and set_levels_(levels) for a budget that learns "
            "it"
        )

    def set_levels_(self, levels: Tensor) -> None:
        """Move each gate to its level in ``levels``, (num_gates,), as far as the family can."""
        raise NotImplementedError(
            f"{type(self).__name__} has no levels: expected levels() and set_levels_(levels) for a budget that learns "
            "it"
        )

    def pull(self) -> Tensor:
        """-dL/dlevel of each gate, (num_gates,), from the present gradients of its parameters; 0 without a gradient."""
        raise NotImplementedError(
            f"{type(self).__name__} has no levels: expected levels(), set_levels_(levels) and pull() for a budget "
            "that learns it"
        )

    def call(self) -> tuple[Tensor, Tensor | None, GateSpec]:
        """(gate parameters, seed, spec) for one call of a fused operator in the current mode.

        The seed is a new one, int64 (1,), or None if nothing is drawn.
        """
        if self._banked is not None and self.training and (banked := self._banked.get()) is not None:
            return banked, None, BANKED
        parameter, spec = getattr(self, self.parameter_name), self.spec
        if torch.compiler.is_compiling():
            _read(spec)
        return parameter, self.draw_seed(parameter.device) if spec.rule == SAMPLE else None, spec

    def draw_seed(self, device: torch.device | None = None) -> Tensor:
        """The seed of one call, int64 (1,).

        It is the seed that :func:`dampr.hold_draws` holds, or else the next one of the gate's generator
        (:func:`dampr.gate_generator`), or else one from torch's global generator. A family of your own that takes its
        noise from this method works with all three; it makes numbers of the seed with :func:`dampr.philox.uniform`, and
        sets ``draws_once``.
        """
        if self._held is not None and (held := self._held.get()) is not None:
            return held if held.device == device else held.to(device)
        if (
            self._stream is None
            and (torch.compiler.is_compiling() or _Wrapper._active_ddp_module is not None)
            and ranks.several()
        ):
            self._agree()
        if self._stream is None:
            return torch.randint(*philox.SEEDS, dtype=torch.int64, device=device)
        return self._stream.draw(self.next_seed)

    def _agree(self) -> None:
        """Under DistributedDataParallel, give all gates of its module a generator that is the same on all ranks.

        Raises: RuntimeError in compiled code.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "gates of a compiled model draw in a process group without a generator that all ranks have: call "
                "dampr.gate_generator(model) before torch.compile"
            )
        found = ranks.wrapper()
        if found is not None:
            share_generator(found.module)

    def _follow(self, stream: Stream | None, persistent: bool = True) -> None:
        """Take seeds from ``stream`` from now on; None for torch's generator.

        persistent: whether the next seed is part of the state dict.
        """
        self._buffers.pop("next_seed", None)
        self._stream = stream
        if stream is not None:
            self.register_buffer("next_seed", torch.tensor([stream.first], device=self.device), persistent=persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Convert the gate; the next seed keeps its value through ``to_empty`` and the meta device, so that ranks stay
        alike.
        """
        before = self._buffers.get("next_seed")
        was_meta = self.device.type == "meta"
        super()._apply(fn, recurse)
        if self._reducer is not None:
            self._reducer.attach()
            self._reducer.materialized |= was_meta and self.device.type != "meta"
        if before is not None and self._stream is not None and not self.next_seed.is_meta:
            if before.is_meta:
                self.next_seed.fill_(self._stream.first)
            else:
                self.next_seed.copy_(before)
        return self

    def index_offset(self, rows: int) -> int:
        """The position of this process's first row in the batch that several processes share; 0 in a single process.

        Each rank of the group that was given to :func:`dampr.gate_generator` has the same number of ``rows``, in the
        order of the ranks.
        """
        return 0 if self._stream is None else self._stream.part() * rows

    def _begin(self, what: str, value: Tensor) -> None:
        """Begin a block in which calls use ``value``: as the seed ("_held") or as the gate values ("_banked")."""
        held = getattr(self, what) or Held()
        held.begin(value)
        setattr(self, what, held)

    def _end(self, what: str) -> None:
        """End a block of :meth:`_begin`."""
        if getattr(self, what).end():
            setattr(self, what, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_held", "_banked", "_reducer")}

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._reducer is not None:  # torch may have replaced parameters (assign=True)
            self._reducer.attach()

    def extra_repr(self) -> str:
        return f"num_gates={self.num_gates}"


class KernelGate(Gate):
    """A family whose values the kernels compute from ``parameter`` and ``spec``."""

    def forward(self, rows: int | None = None) -> Tensor:
        """Gate values, (num_gates,), or (rows, num_gates) with one draw for each row."""
        parameter, seed, spec = self.call()
        offset = 0 if rows is None or seed is None else self.index_offset(rows)
        return functional.sample_gates(parameter, seed=seed, rows=rows, spec=spec, index_offset=offset)
