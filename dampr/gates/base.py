"""What a layer knows of a gate family."""

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
# of values that were drawn already, in [0, 1]: itself, with the gradient 0 where it is 0 or 1, as the draw's is
BANKED = ramp("clip")


class GateModule(nn.Module):
    """Gate parameters: they stay in float32 (or float64) when a model is cast to half precision,
    and no dense checkpoint touches them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GateModule:
        def keep_precision(t: Tensor) -> Tensor:
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
        # A dense checkpoint of the layer around it has no gates: they stay as they are. One that was made with them, as
        # its metadata tells, and has lost their values, does not load. Where parameters are replaced (assign=True)
        # torch says so in the metadata too.
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not prefix or local_metadata.keys() - {"assign_to_params_buffers"} or own:
            super()._load_from_state_dict(state_dict | _precise(own), prefix, local_metadata, *args)


def _precise(state: dict[str, Any]) -> dict[str, Any]:
    """These values with gates in half precision, which no gate computes in, in float32."""
    return {
        key: value.to(torch.float32)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in _checks.GATE_DTYPES
        else value
        for key, value in state.items()
    }


def _read(spec: GateSpec) -> bool:
    """Look at every constant, outside of the autograd function that takes them.

    With ``dynamic=True`` dynamo makes symbols of them where it first reads them. A second call cannot see those of
    within such a function, so a gate that two layers share did not compile.
    """
    return any(constant != constant for constant in spec)


def gradient(parameter: Tensor) -> Tensor:
    """The gradient that a parameter holds, or zeros."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Gate(GateModule):
    """A vector of learned gates; the interface of every family.

    In training mode gates may be drawn, in evaluation mode they are deterministic.

    A family of your own is a subclass whose constructor takes ``(num_gates, *, device=None)`` and hands ``num_gates``
    on, and which overrides :meth:`forward` and :meth:`open_probability`. Everything else follows: the fused ops are
    given the values of ``forward()`` and multiply by them, and their gradients come back into it. Layers take the
    class, or an instance: ``GatedLinear(8, 4, gate=SigmoidGate)``. Such values are computed once per call, so
    ``per_sample=True`` of a layer changes nothing, as for every family but the hard concrete ones.

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
    draws_once: bool = False  # whether it draws beside the kernels, so that what these multiply by is one draw per call
    former: tuple[Tensor, ...] = ()  # parameters of the gates in whose place it stands, which optimizers may hold
    in_optimizer: bool = False  # whether :func:`dampr.param_groups` gave it a learning rate of its own
    # the beginnings of the names of the parameters that :meth:`set_levels_` moves
    level_parameters: tuple[str, ...] = ()
    parameter_name: str = "parameter"  # the attribute that :attr:`parameter` is, where it is one
    # (start, stop) of the open gates, where a family keeps these side by side
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
        """Fresh values in every parameter, as the constructor leaves them, and the first seed of a generator of its
        own.

        A family of your own overrides it, calls this one and fills its parameters; NotImplementedError says where it
        does not.
        """
        if self._stream is not None:
            self._stream = Stream(self._stream.first, self._stream.group)
            self.next_seed.fill_(self._stream.first)
        if type(self).reset_parameters is Gate.reset_parameters and next(self.parameters(), None) is not None:
            raise NotImplementedError(
                f"{type(self).__name__} has no reset_parameters(), which fills its parameters with fresh values"
            )

    def starts_at_one(self) -> bool:
        """Whether every gate is 1 in evaluation; of gates on the meta device, whether fresh ones are."""
        z = self.deterministic()
        if z.is_meta:
            fresh = copy.deepcopy(self).to_empty(device="cpu")
            fresh.reset_parameters()
            z = fresh.deterministic()
        return bool((z == 1).all())

    @classmethod
    def for_layer(cls, num_gates: int, device: torch.device | str | None = None) -> Gate:
        """The gate of a layer that was given this class or its name."""
        return cls(num_gates, device=device)  # type: ignore[call-arg]

    @property
    def spec(self) -> GateSpec:
        """Family and constants for the current mode (training or evaluation), for the fused ops."""
        return VALUE_SPEC

    @property
    def draws(self) -> bool:
        """Whether the values of the present mode are drawn, so that ``forward(rows)`` gives each row its own."""
        return self.spec.rule == SAMPLE or (self.draws_once and self.training)

    @property
    def draws_in_training(self) -> bool:
        """:attr:`draws` in training mode, whichever mode it is."""
        training = self.training
        self.training = True
        try:
            return self.draws
        finally:
            self.training = training

    @property
    def device(self) -> torch.device:
        """Where the parameters of the gate are."""
        return next((t.device for t in itertools.chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def parameter(self) -> Tensor:
        """What the fused ops take, (num_gates,): parameters of the family in ``spec``,
        by default the values of :meth:`forward`.
        """
        return self.forward()

    @abstractmethod
    def forward(self, rows: int | None = None) -> Tensor:
        """Gate values: (num_gates,), or (rows, num_gates) with one draw per row; drawn in training,
        deterministic in evaluation.
        """

    def deterministic(self) -> Tensor:
        """The evaluation values in either mode, (num_gates,)."""
        training = self.training
        self.eval()
        try:
            return self.forward()
        finally:
            self.train(training)

    @abstractmethod
    def open_probability(self) -> Tensor:
        """The differentiable surrogate count of each gate, (num_gates,):
        the probability of being open where the family draws.
        """

    def is_open(self) -> Tensor:
        """The evaluation decision: bool, (num_gates,)."""
        with torch.no_grad():
            return self.deterministic() != 0

    def levels(self) -> Tensor:
        """Where each gate stands, (num_gates,) without a graph: 1 is where a fresh gate is, and at 0 and below
        evaluation closes it.

        With :meth:`set_levels_` this is how a budget moves learned gates. A family without the two cannot be learned
        under a budget that owns its gates; NotImplementedError says so.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no levels: expected levels() and set_levels_(levels) for a budget that learns "
            "it"
        )

    def set_levels_(self, levels: Tensor) -> None:
        """Move each gate to where ``levels``, (num_gates,), wants it, as far as the family can."""
        raise NotImplementedError(
            f"{type(self).__name__} has no levels: expected levels() and set_levels_(levels) for a budget that learns "
            "it"
        )

    def pull(self) -> Tensor:
        """-dL/dlevel of each gate, (num_gates,), from the gradients that its parameters hold now;
        zeros where there are none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no levels: expected levels(), set_levels_(levels) and pull() for a budget "
            "that learns it"
        )

    def call(self) -> tuple[Tensor, Tensor | None, GateSpec]:
        """What a fused op takes for one call in the present mode: the parameters, a fresh seed or None,
        and the spec.
        """
        if self._banked is not None and self.training and (banked := self._banked.get()) is not None:
            return banked, None, BANKED
        parameter, spec = getattr(self, self.parameter_name), self.spec
        if torch.compiler.is_compiling():
            _read(spec)
        return parameter, self.draw_seed(parameter.device) if spec.rule == SAMPLE else None, spec

    def draw_seed(self, device: torch.device | None = None) -> Tensor:
        """The seed of one call, int64 of shape (1,): a held one, the next one of the gate's generator, or one of
        torch's generator.

        All noise of a gate comes from here, so a family of your own whose noise does too is held by
        :func:`dampr.hold_draws` and follows :func:`dampr.gate_generator`; :func:`dampr.philox.uniform` makes numbers of
        it. Such a family sets ``draws_once``.
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
        """Under DistributedDataParallel, give all gates of its module a generator that the other ranks have too."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "gates of a compiled model draw in a process group without a generator that all ranks have: call "
                "dampr.gate_generator(model) before torch.compile"
            )
        found = ranks.wrapper()
        if found is not None:
            share_generator(found.module)

    def _follow(self, stream: Stream | None, persistent: bool = True) -> None:
        """Take seeds from this stream from now on; ``persistent``: how far it has come is part of the state dict."""
        self._buffers.pop("next_seed", None)
        self._stream = stream
        if stream is not None:
            self.register_buffer("next_seed", torch.tensor([stream.first], device=self.device), persistent=persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """The next seed outlives ``to_empty`` and the meta device, because ranks have to go on alike."""
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
        """The number of the first of ``rows`` rows of this process in the batch that several processes share; 0 where
        there is one.

        Each rank of the group that :func:`dampr.gate_generator` was given has as many rows, in the order of the ranks.
        """
        return 0 if self._stream is None else self._stream.part() * rows

    def _begin(self, what: str, value: Tensor) -> None:
        """Have ``value`` in ``what``, ``"_held"`` or ``"_banked"``, for the calls of a block."""
        held = getattr(self, what) or Held()
        held.begin(value)
        setattr(self, what, held)

    def _end(self, what: str) -> None:
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
    """A family that the kernels know: values follow from ``parameter`` and ``spec``."""

    def forward(self, rows: int | None = None) -> Tensor:
        parameter, seed, spec = self.call()
        offset = 0 if rows is None or seed is None else self.index_offset(rows)
        return functional.sample_gates(parameter, seed=seed, rows=rows, spec=spec, index_offset=offset)
