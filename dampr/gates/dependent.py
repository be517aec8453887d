"""The Dep-L0 family: one small network computes the log_alpha of every gate of a model, so gates of different layers
depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from dampr import _checks, functional, names, ops, reference
from dampr.spec import hard_concrete

from . import recomputed
from .base import Gate, GateModule, gradient
from .hard_concrete import LOGIT_LIMIT, ConcreteGate

DIRECTIONS = get_args(names.Direction)


class _Evaluation(NamedTuple):
    """The log_alphas that a generator has computed from one state of its parameters.

    Attributes:
        key: identifies that state (:meth:`DependencyGenerator._key`).
        values: the log_alpha of every layer, in the order of the network.
        consumed: not empty once a backward has gone through ``values``.
        served: the indices of the layers that have asked for their log_alpha.
    """

    key: tuple[Any, ...]
    values: list[Tensor]
    consumed: list[bool]
    served: set[int]


class DependencyGenerator(GateModule):
    """The gate generator of Dep-L0 (Li and Ji, ECML PKDD 2021, arXiv 2107.00070), as in the authors' code.

    a_l = ln 100 tanh(W_l a_{l-1} + b_l) with a_0 = 1, and log_alpha of layer l is a_l; ln 100 takes the place of
    Louizos et al.'s clamp.

    Args:
        sizes: the number of gates of each gated layer, in the order of the network.
        direction: ``"forward"`` runs from the first layer to the last, ``"backward"`` from the last to the first.
        input_width: how many ones a_0 has; None: as many as the layer that comes first in that direction has gates.
            That is what the published networks have, except VGG16 backward (64 for a layer of 512).
        init_scale: factor on the initial weights, U(-1, 1) / sqrt(in). At 1, as published, about 7 % of the gates of a
            deep network are closed before training starts; at 0 every gate starts fully open.
        bias_init: mean of the initial biases, N(bias_init, 0.01).
        device: the device of the parameters. They are float32 and stay so under autocast and ``.half()``.

    The generator has no noise and no input, so it is evaluated once per step for all gates. The values are kept until a
    parameter changes or a backward has gone through them. Without gradients, each layer gets the kept values once, so
    they last for one pass of the model: averaged weights are often copied in through ``p.data``, which does not change
    PyTorch's version counters.

    Raises: ValueError or TypeError that names the argument.

    >>> generator = DependencyGenerator([16, 32, 32], init_scale=0.0)
    >>> [gate.eval()().min().item() for gate in generator.gates()]
    [1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        direction: names.Direction = "forward",
        input_width: int | None = None,
        init_scale: float = 1.0,
        bias_init: float = 3.0,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.sizes = tuple(_checks.positive_int("sizes", size) for size in _checks.items("sizes", sizes))
        if not self.sizes:
            raise ValueError(f"sizes={sizes!r:.80}: expected the number of gates of at least one layer")
        _checks.one_of("direction", direction, DIRECTIONS)
        self.direction = direction
        self._order = list(range(len(self.sizes))) if direction == "forward" else list(reversed(range(len(self.sizes))))
        self.input_width = (
            self.sizes[self._order[0]] if input_width is None else _checks.positive_int("input_width", input_width)
        )
        self.init_scale, self.bias_init = (
            _checks.number("init_scale", init_scale),
            _checks.number("bias_init", bias_init),
        )
        self._last: _Evaluation | None = None
        device = _checks.device("device", device)
        width = self.input_width
        for index in self._order:
            weight = torch.empty(self.sizes[index], width, dtype=torch.float32, device=device)
            bias = torch.empty(self.sizes[index], dtype=torch.float32, device=device)
            self.register_parameter(f"weight_{index}", nn.Parameter(weight))
            self.register_parameter(f"bias_{index}", nn.Parameter(bias))
            width = self.sizes[index]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights and biases for every layer, as the constructor does."""
        for index in self._order:
            self.reset_layer(index)

    @torch.no_grad()
    def reset_layer(self, index: int) -> None:
        """Draw fresh weights and biases for the generator's layer that makes the gates of layer ``index`` of the
        network.
        """
        weight, bias = (getattr(self, f"{kind}_{index}") for kind in ("weight", "bias"))
        bound = self.init_scale / math.sqrt(weight.shape[1])
        weight.uniform_(-bound, bound)
        bias.normal_(self.bias_init, 0.01)

    def forward(self) -> list[Tensor]:
        """The log_alpha of every layer, in the order of the network: a float32 tensor (sizes[l],) for each."""
        kept = self._kept(self._order)
        return self._in_order(self._run(upto=self._order[-1])) if kept is None else list(kept)

    def log_alpha(self, index: int) -> Tensor:
        """The log_alpha of layer ``index``, float32, (sizes[index],)."""
        kept = self._kept([index])
        return self._run(upto=index)[-1] if kept is None else kept[index]

    def _kept(self, layers: list[int]) -> list[Tensor] | None:
        """The log_alphas of all layers, evaluated once per step; None if they may not be kept.

        ``layers``: the indices of the layers that ask.
        """
        if not self._may_keep():
            return None
        key = self._key()
        last = self._last
        if last is None or last.key != key or self._is_over(last, layers):
            last = self._last = self._evaluate(key)
        last.served.update(layers)
        return last.values

    def _is_over(self, last: _Evaluation, layers: list[int]) -> bool:
        """Whether ``layers`` ask for values of a later step than ``last``, even though no parameter seems changed."""
        if last.values[0].grad_fn is None:
            return not last.served.isdisjoint(layers)
        # Activation checkpointing runs the forward again within a backward. The values stay valid there, because that
        # backward does not go through them a second time.
        return bool(last.consumed) and torch._C._current_graph_task_id() == -1

    def _in_order(self, values: list[Tensor]) -> list[Tensor]:
        """Reorder ``values`` from the order of evaluation to the order of the network."""
        return values if self.direction == "forward" else values[::-1]

    def gates(self, **options: Any) -> list[DependentHardConcrete]:
        """A gate for each layer, in the order of the network; ``options`` as for :class:`DependentHardConcrete`."""
        return [DependentHardConcrete(self, index, **options) for index in range(len(self.sizes))]

    def penalty(self, kernel_areas: Sequence[float], lam: float, first: float = 3.0) -> Tensor:
        """The penalty of the published networks: lam sum_l k_l^2 P_{l-1} P_l, a scalar.

        P_l is the expected number of open gates of layer l, and P_0 = ``first`` the channels of the image. Each layer
        counts as if it read the gated layer before it, as published. Add it to a mean cross-entropy.

        Args:
            kernel_areas: k_l^2 of each gated convolution, in the order of the network.
            lam: the weight; 1e-6 (VGG16) or 5e-7 (ResNet56) in the published runs.
            first: the channels of the image.
        """
        opened = self._expected_open(kernel_areas)
        total = opened[0] * (kernel_areas[0] * first)
        for area, before, after in zip(kernel_areas[1:], opened, opened[1:], strict=False):
            total = total + area * before * after
        return lam * total

    def filter_penalty(
        self, kernel_areas: Sequence[float], in_channels: Sequence[int], lam: float, as_published: bool = False
    ) -> Tensor:
        """The penalty of the published ImageNet runs: lam sum_l P_l c_l k_l^2, a scalar, with lam 5e-9.

        Args:
            kernel_areas: k_l^2 of each gated convolution, in the order of the network.
            in_channels: c_l, the dense input channels of each.
            lam: the weight.
            as_published: the authors' code multiplies by k_l^2 twice, so that a 7 x 7 stem costs 49 times too much;
                True does the same.
        """
        opened = self._expected_open(kernel_areas)
        if len(in_channels) != len(opened):
            raise ValueError(f"in_channels={in_channels!r}: expected {len(opened)} numbers, one per gated layer")
        areas = [area * area if as_published else area for area in kernel_areas]
        return lam * torch.stack([p * (c * area) for p, c, area in zip(opened, in_channels, areas, strict=True)]).sum()

    def _expected_open(self, kernel_areas: Sequence[float]) -> list[Tensor]:
        """The expected number of open gates of each layer, one scalar each."""
        if len(kernel_areas) != len(self.sizes):
            raise ValueError(f"kernel_areas={kernel_areas!r}: expected {len(self.sizes)} numbers, one per gated layer")
        return [functional.open_probability(log_alpha, spec=hard_concrete()).sum() for log_alpha in self()]

    def _run(self, upto: int | None = None) -> list[Tensor]:
        """Evaluate the generator: the log_alpha of each layer, a_l of the class docstring, in the order of evaluation.

        Args:
            upto: None: evaluate all layers by the fused operator. A layer's index: evaluate in plain PyTorch, and stop
                after this layer.

        Returns: float32 tensors (sizes[l],), one for each evaluated layer. For ``direction="backward"`` the last layer
        of the network comes first.
        """
        order = self._order if upto is None else self._order[: self._order.index(upto) + 1]
        parameters: list[Tensor] = [getattr(self, f"{kind}_{index}") for index in order for kind in ("weight", "bias")]
        evaluate = ops.dependency_generator if upto is None else reference.dependency_generator
        where = parameters[0].device.type
        # torch.autocast does not accept the device "meta"
        with torch.autocast(where, enabled=False) if where != "meta" else nullcontext():
            return evaluate(parameters, LOGIT_LIMIT)

    def _evaluate(self, key: tuple[Any, ...]) -> _Evaluation:
        """Run the generator and register hooks that note when a backward goes through its values."""
        # Hide the saved tensors of this graph from activation checkpointing. Its hooks count the saved tensors of each
        # layer, and would count those of the generator for whichever layer asked first.
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda t: t):
            values = self._run()
        consumed: list[bool] = []
        for node in {a.grad_fn for a in values if a.grad_fn is not None}:
            node.register_prehook(lambda _: consumed.append(True))
        return _Evaluation(key, self._in_order(values), consumed, set())

    def _key(self) -> tuple[Any, ...]:
        """A key that is equal as long as an evaluation would give the same values with the same graph."""
        tensors = [
            (id(p), p._version, p.data_ptr(), p.requires_grad) for p in self._parameters.values() if p is not None
        ]
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tensors

    def _may_keep(self) -> bool:
        """Whether values may be kept between calls: False while tensors are symbols or wrapped, a transform or a
        dispatch mode is active, or a reentrant checkpoint runs again, for each has a backward of its own. Every gate
        then computes its own log_alpha.
        """
        return not (
            torch.compiler.is_compiling()
            or recomputed.region_by_node() is not None
            or ops.is_transformed()
            or torch._C._len_torch_dispatch_stack() > 0
            or any(p is not None and p.is_inference() for p in self._parameters.values())
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # tensors with a graph cannot be copied, nor need they be

    def extra_repr(self) -> str:
        return f"{list(self.sizes)}, direction={self.direction!r}, input_width={self.input_width}"


class DependentHardConcrete(ConcreteGate):
    """The hard concrete gates of one layer under Dep-L0 (Li and Ji 2021); a generator that the whole model shares
    computes their log_alpha.

    Args:
        generator: the :class:`DependencyGenerator` of the whole model. It is a child of every gate that uses it.
            ``model.parameters()`` lists its parameters once; a ``state_dict`` names them once per gate, as for all
            shared modules.
        index: the layer of the generator.
        beta, gamma, zeta, preset: as for :class:`dampr.gates.HardConcrete`; the published code has the same
            constants.

    As published, each example has a draw of its own (``per_sample=True`` of the layer, the default of
    :func:`dampr.convert` for this family), and the gates stand after the norm. A layer that is given this class or
    the name ``"dep_l0"`` gets a generator of its own, whose gates start open; the gates of a model share one through
    ``generator.gates()``.

    Raises: ValueError or TypeError that names the argument.
    """

    level_parameters = ("generator.bias",)

    def __init__(
        self,
        generator: DependencyGenerator,
        index: int,
        *,
        beta: float = 2.0 / 3.0,
        gamma: float = -0.1,
        zeta: float = 1.1,
        preset: names.Preset = "paper",
    ) -> None:
        if not isinstance(generator, DependencyGenerator):
            raise TypeError(f"generator={generator!r}: expected a DependencyGenerator")
        index = _checks.positive_int("index", index, least=0)
        if index >= len(generator.sizes):
            raise ValueError(f"index={index}: expected one below {len(generator.sizes)}, the layers of the generator")
        super().__init__(generator.sizes[index], beta=beta, gamma=gamma, zeta=zeta, preset=preset)
        self.generator = generator
        self.index = index

    @classmethod
    def for_layer(cls, num_gates: int, device: torch.device | str | None = None) -> Gate:
        """The gates of one layer with a generator of their own."""
        return cls(DependencyGenerator([num_gates], device=device), 0)

    def reset_parameters(self) -> None:
        """Draw fresh weights and biases for the generator's layer that makes these gates."""
        super().reset_parameters()
        self.generator.reset_layer(self.index)

    @property
    def log_alpha(self) -> Tensor:  # type: ignore[override]
        """The log_alpha of the gates, float32, (num_gates,), with a graph to the parameters of the generator."""
        return self.generator.log_alpha(self.index)

    @torch.no_grad()
    def set_levels_(self, levels: Tensor) -> None:
        """Move each gate to its level in ``levels``, float32 (num_gates,), by its bias in the generator.

        Each bias moves one gate here, and through it the gates of later layers.
        """
        bias: Tensor = getattr(self.generator, f"bias_{self.index}")
        wanted, now = (torch.atanh(a / LOGIT_LIMIT * (1 - 1e-4)) for a in (self._log_alpha_at(levels), self.log_alpha))
        bias.add_(wanted - now)

    def pull(self) -> Tensor:
        """-dL/dlevel of each gate, (num_gates,), from the gradient of its bias in the generator."""
        lo, hi = self._ends()
        slope = LOGIT_LIMIT * (1 - (self.log_alpha.detach() / LOGIT_LIMIT).square())
        return -gradient(getattr(self.generator, f"bias_{self.index}")) / slope.clamp(min=1e-3) * (hi - lo)

    @property
    def place_in_order(self) -> int:
        """The position of these gates in the order in which the gates of one generator depend on each other.

        A budget moves them in that order.
        """
        return self.index if self.generator.direction == "forward" else -self.index

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, index={self.index}"
