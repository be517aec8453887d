"""Shrinker: removes units whose gates stay closed from a model while it trains, and puts them back on request."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dampr import _checks
from dampr.gates import Fixed, Gate, OwnedGate, SteppedGate, ranks
from dampr.gates.selected import SelectedGate
from dampr.nn.residual import FLAT_AT_ZERO

from . import inputs
from .budget import Budget
from .closed_layout import layouts_of, vectors
from .cost import Cost
from .expand import Optimizers, PassedChecks, check_state, optimizers_of
from .layout import WHOLE, Layout, Shelf, move_state, moved, shapes_of
from .modules import of_kind
from .summary import gated_layers
from .values import with_tensors
from .wrapped import check_bare

_IN_PLACE = "it becomes smaller in place"
Copies = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True)
class Shrink:
    """A record of one removal, or one return, of units.

    Attributes:
        step: the number of calls of ``step`` before it.
        units: how many units were removed; negative if they came back.
        before, after: the share of the cost before and after.
        seconds: how long it took.
    """

    step: int
    units: int
    before: float
    after: float
    seconds: float

    def __str__(self) -> str:
        units = f"{abs(self.units)} unit{'s' * (abs(self.units) != 1)}"
        went = f"{units} left" if self.units > 0 else f"{units} came back"
        return (
            f"step {self.step}: {went}, {self.before:.1%} to {self.after:.1%} of the cost, in "
            f"{self.seconds * 1e3:.0f} ms"
        )


class Shrinker:
    """Removes units whose gates stay closed from a gated model, physically and in place, while it trains.

    The gradients of a closed unit are all 0, so the model without it computes the same outputs and the same gradients,
    to rounding, in less time. Parameters stay the same objects with smaller data, so optimizers, schedulers and
    gradient scalers continue to work; gradients, optimizer state and copies of the model are cut too. Gates remain
    whole vectors (:class:`dampr.gates.SelectedGate`), so a budget counts and draws as before. Every removal is tested
    on the example inputs: units whose removal changes the outputs stay, and :attr:`notes` says so.

    Under a :class:`dampr.Budget` with ``steps``, a unit is removed once the budget has closed it and would not keep it
    at any later goal. Otherwise it is removed after its gate was closed in ``patience`` calls of :meth:`step`. A random
    gate counts as closed if evaluation closes it and it is drawn open with a probability of at most ``probability``;
    with 0, training is the same to rounding. Removed units are kept in host memory. They return with their old values
    when the budget wants them again, or on :meth:`expand`. (:func:`dampr.expand` makes a copy with zeros instead.)

    Args:
        model: a model with gated layers, or with gates on parameters; changed in place.
        example_inputs: as for :func:`dampr.compact`.
        budget: the budget that owns the gates of ``model``, if there is one.
        patience: without a budget, the number of consecutive calls of :meth:`step` in which a gate has to be closed.
        probability: a gate that is drawn open with a greater probability counts as open; in [0, 1).
        least_saving: :meth:`step` removes units only if that saves at least this share of the present cost; in [0, 1).

    Attributes:
        model: the model.
        removed: bool, (all gates,), the gates whose units are removed, in the order of :class:`dampr.prune.Cost`.
        events: the removals and returns, a list of :class:`Shrink`.
        notes: gated layer -> why its units stay.

    Raises: ValueError or TypeError that names the argument; what the model raises on the example inputs.

    Make DistributedDataParallel again each time that parameters have changed their shapes; the old wrapper raises in
    its next step.

    >>> import dampr
    >>> x = torch.randn(8, 4)
    >>> model = dampr.convert(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), example_inputs=x)
    >>> model[0].gate.log_alpha.data[:3] = -30
    >>> shrinker = Shrinker(model, x, patience=1)
    >>> shrinker.step()
    True
    >>> model[0].weight.shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        budget: Budget | None = None,
        patience: int = 100,
        probability: float = 1e-3,
        least_saving: float = 0.05,
    ) -> None:
        _checks.module("model", model)
        check_bare(model, _IN_PLACE)
        inputs.check(example_inputs)
        patience = _checks.positive_int("patience", patience)
        for name, share in (("probability", probability), ("least_saving", least_saving)):
            if not 0 <= _checks.number(name, share) < 1:
                raise ValueError(f"{name}={share!r}: expected a number in [0, 1)")
        layers = gated_layers(model)
        if not layers:
            raise ValueError(
                f"model={type(model).__name__}: expected gated layers in it (dampr.convert puts them there)"
            )
        if is_shrunk(model):
            raise ValueError(
                f"model={type(model).__name__}: units have left it already; expected one Shrinker for each model"
            )
        _check_budget(budget, model)
        self.model, self.patience, self.probability, self.least_saving = model, patience, probability, least_saving
        self._budget, self._inputs = budget, example_inputs
        self.cost = Cost(model, example_inputs, "macs") if budget is None else budget.cost
        self._layouts = layouts_of(model, self.cost.structure)
        self._layout = WHOLE
        self.removed = torch.zeros(self.cost.structure.size, dtype=torch.bool)
        self._refused = torch.zeros_like(self.removed)  # gates whose units must stay
        self._closed_for = torch.zeros(self.cost.structure.size, dtype=torch.int64)
        self.steps = 0
        self._passed = PassedChecks()
        self.events: list[Shrink] = []
        self._shelves: dict[str, Shelf] = {}  # the removed elements of the model, each optimizer and each copy
        if budget is None:
            self._stay_where_draws_are_per_sample()

    def _stay_where_draws_are_per_sample(self) -> None:
        """Refuse to remove units of layers with a draw for each sample."""
        for name, layer in self.cost.structure.gated.items():
            if layer.per_sample:
                rows = self.cost.structure.rows(name)
                self._refused[rows[0].start : rows[-1].stop] = True
                self._layouts.notes[name] = (
                    "per_sample=True: its draws are made with the product, for all gates of the layer"
                )

    @property
    def notes(self) -> dict[str, str]:
        """gated layer -> why its units stay until the model is compacted."""
        return dict(self._layouts.notes)

    @property
    def left(self) -> float:
        """The cost of the units that are still in the model, as a share of the whole model's cost."""
        return float(self.cost((~self.removed).double())) / self.cost.total

    def candidates(self) -> Tensor:
        """The gates whose units can be removed now, or are removed already: bool, (all gates,), on the host."""
        closed = torch.cat([closed_for_good(gate, self.probability).cpu() for gate in self.cost.structure.gates])
        if self._budget is not None and self._budget.controller is not None:
            closed &= self._budget.controller.given_up()
        elif self._budget is None:
            closed &= self._closed_for >= self.patience
        return (closed & ~self._refused) | self.removed

    def saving(self, wanted: Tensor | None = None) -> float:
        """The share of the present cost that removing the units of ``wanted`` saves, by default of
        :meth:`candidates`.
        """
        wanted = self.candidates() if wanted is None else wanted
        _, gone = self._layouts.of(wanted)
        now = self.left * self.cost.total
        return (now - float(self.cost((~gone).double()))) / max(now, 1e-30)

    def step(self, optimizer: Optimizers = None, *, ema: Copies = ()) -> bool:
        """Remove the units that can be removed, if that saves enough, and put units back that the budget wants again.

        Call it after ``optimizer.step()`` and ``budget.step()``. The arguments are those of :meth:`shrink`.

        Returns: whether parameters have changed their shapes.

        Raises: ValueError for an optimizer whose state cannot be cut, at the first step.
        """
        for one in optimizers_of(optimizer):
            self._passed.run(one, check_state)
        self.steps += 1
        if self._budget is None:
            closed = torch.cat([closed_for_good(gate, self.probability).cpu() for gate in self.cost.structure.gates])
            self._closed_for = torch.where(closed, self._closed_for + 1, 0)
        grown = self.bring_back(optimizer, ema=ema) > 0
        wanted = self.candidates()
        if not bool((wanted & ~self.removed).any()) or self.saving(wanted) < max(self.least_saving, 1e-12):
            return grown
        return self.take(wanted, optimizer, ema=ema) > 0 or grown

    def bring_back(self, optimizer: Optimizers = None, *, ema: Copies = ()) -> int:
        """Put removed units that the budget wants back into the model, with their old values; returns how many."""
        if self._budget is None or self._budget.controller is None:
            return 0
        wanted = self.removed & self._budget.controller.keep
        count = int(wanted.sum())
        if count:
            before, began = self.left, time.perf_counter()
            self._to(self.removed & ~wanted, optimizer, ema, prove=False)
            self.events.append(Shrink(self.steps, -count, before, self.left, time.perf_counter() - began))
        return count

    def shrink(self, optimizer: Optimizers = None, *, ema: Copies = ()) -> int:
        """Remove the units of all candidates from the model, however little that saves; returns how many.

        Args:
            optimizer: the optimizers of the weights, one or several; the state of what is left of them is kept. None:
                make a new optimizer if anything was removed.
            ema: copies of the model, such as :class:`torch.optim.swa_utils.AveragedModel`, which lose the same units.

        Raises: ValueError, before anything changes, for an optimizer whose state cannot be cut, and for copies of
        another structure.
        """
        return self.take(self.candidates(), optimizer, ema=ema)

    def take(self, wanted: Tensor, optimizer: Optimizers = None, *, ema: Copies = ()) -> int:
        """As :meth:`shrink`, for the gates ``wanted``, which :meth:`candidates` has returned at this step."""
        began, before, removed = time.perf_counter(), self.left, self.removed
        self._to(wanted, optimizer, ema, prove=True)
        count = int((self.removed & ~removed).sum())
        if count:
            self.events.append(Shrink(self.steps, count, before, self.left, time.perf_counter() - began))
        return count

    def expand(self, optimizer: Optimizers = None, *, ema: Copies = ()) -> None:
        """Put all removed units back with their old values.

        Call it before ``budget.finalize()`` and :func:`dampr.compact`.
        """
        self._to(torch.zeros_like(self.removed), optimizer, ema, prove=False)

    def _to(self, wanted: Tensor, optimizer: Optimizers, ema: Copies, prove: bool) -> None:
        """Remove exactly the units of ``wanted``; ``prove``: keep those whose removal changes the outputs."""
        check_bare(self.model, _IN_PLACE)
        optimizers = optimizers_of(optimizer)
        copies = check_copies(ema, self.model)
        for one in optimizers:
            check_state(one)
        layout, gone = self._layouts.of(wanted)
        shapes = shapes_of(self.model)
        if prove:
            layout, gone = self._proved(layout, gone)
        changed = moved(self.model, self._layout, layout, self._shelf("model"))
        for number, copy in enumerate(copies):
            moved(copy, self._layout, layout, self._shelf(f"copy {number}"))
        for number, one in enumerate(optimizers):
            move_state(one, self.model, changed, shapes, self._shelf(f"optimizer {number}"))
        if not torch.equal(self.removed, gone):
            ranks.watch(self.model, resized=True)
        self._layout, self.removed = layout, gone
        for module in (self.model, *copies):
            module.dampr_layout = layout  # type: ignore[assignment]
            if not layout:
                del module.dampr_layout

    def _shelf(self, name: str) -> Shelf:
        """The removed elements of the tensors of one object (model, copy or optimizer)."""
        return self._shelves.setdefault(name, {})

    def _proved(self, layout: Layout, gone: Tensor) -> tuple[Layout, Tensor]:
        """The layout and its gates, without the gate vectors whose removal changes the outputs."""
        if not layout or self._agrees(layout):
            return layout, gone
        kept = self.removed.clone()
        for own in vectors(self.cost.structure, gone & ~self.removed):
            trial, reached = self._layouts.of(kept | own)
            if self._agrees(trial):
                kept = reached
            else:
                self._refused |= own
                self._note(
                    own, "without its closed units the outputs are others, so these stay until the model is compacted"
                )
        return self._layouts.of(kept)

    def _agrees(self, layout: Layout) -> bool:
        """Whether a copy of the model computes the same outputs in ``layout``.

        It is compared in double precision if the model runs in it, else in its own precision.
        """
        given = inputs.samples(self.model, self._inputs)
        for kind in (torch.float64, None):
            samples = given
            trial = inputs.copied(self.model)
            if kind is not None:
                trial, samples = trial.to(kind), with_tensors(_doubled, samples)
            try:
                expected = [_run(trial, sample) for sample in samples]
            except (RuntimeError, TypeError, ValueError):
                continue  # the model cannot run in double precision
            try:
                moved(trial, self._layout, layout)
                pairs = [(before, _run(trial, sample)) for sample, before in zip(samples, expected, strict=True)]
            except (RuntimeError, ValueError, IndexError):
                return False
            return not any(
                inputs.differ(a, b, bound := _tolerance(a), bound * max(inputs.size(a), 1e-30)) for a, b in pairs
            )
        return False

    def _note(self, own: Tensor, why: str) -> None:
        """Note ``why`` for each layer that has one of the gates ``own``."""
        for name in self.cost.structure.gated:
            rows = self.cost.structure.rows(name)
            if bool(own[rows[0].start : rows[-1].stop].any()):
                self._layouts.notes[name] = why

    def explain(self) -> str:
        """A text: what was removed, when, and how long it took; and what stays, and why."""
        lines = [str(event) for event in self.events] or ["no unit has left the model yet"]
        return "\n".join(lines + [f"{name}: {note}" for name, note in self.notes.items()])

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, next to those of model, optimizer and budget."""
        return {
            "removed": self.removed.clone(),
            "refused": self._refused.clone(),
            "closed_for": self._closed_for.clone(),
            "steps": self.steps,
            "events": [asdict(event) for event in self.events],
            "shelves": {name: dict(shelf) for name, shelf in self._shelves.items()},
        }

    def load_state_dict(self, state: dict[str, Any], optimizer: Optimizers = None, *, ema: Copies = ()) -> None:
        """Bring the model of a new Shrinker to the saved widths.

        Call it *before* you load the states of model and optimizer.

        Raises: ValueError if ``state`` is not a state of a Shrinker of this model.
        """
        anything = {"events": None, "shelves": None}
        _checks.state("state", state, self.state_dict() | anything)
        removed = state["removed"]
        _, gone = self._layouts.of(removed)
        if not torch.equal(gone, removed):
            raise ValueError(
                "state: it removes units that this model cannot lose; expected the state of the same model"
            )
        self._to(removed, optimizer, ema, prove=False)
        self._refused, self._closed_for = state["refused"].clone(), state["closed_for"].clone()
        self.steps = int(state["steps"])
        self.events = [Shrink(**event) for event in state["events"]]
        self._shelves = {name: {key: t.clone() for key, t in shelf.items()} for name, shelf in state["shelves"].items()}


def _run(model: nn.Module, sample: Any) -> list[Tensor]:
    """The outputs of ``model`` in evaluation mode, without torch's fused paths."""
    with inputs.unfused():
        return inputs.evaluate(model, sample)


def _doubled(value: Tensor) -> Tensor:
    """A floating-point tensor in float64; another one unchanged."""
    return value.double() if value.is_floating_point() else value


def _tolerance(outputs: list[Tensor]) -> float:
    """The relative error to allow for outputs of these dtypes."""
    return max(
        (inputs.TOLERANCE[t.dtype] for t in outputs if t.dtype in inputs.TOLERANCE),
        default=inputs.TOLERANCE[torch.float32],
    )


@torch.no_grad()
def closed_for_good(gate: Gate, probability: float) -> Tensor:
    """Which gates of a whole vector are closed and cannot learn to open again: bool, (num_gates,).

    These are closed in evaluation, are drawn open in training with at most ``probability``, and get no gradient. Some
    families send a gradient to closed gates (straight-through estimators), which can open them again.
    """
    if isinstance(gate, SteppedGate):
        return ~gate.is_open()
    family = gate.family if isinstance(gate, OwnedGate) else gate
    training, family.training = family.training, True
    try:
        flat, draws = family.spec.family in FLAT_AT_ZERO, family.draws
    finally:
        family.training = training
    closed = ~family.is_open()
    if not (flat or isinstance(family, Fixed)):
        return torch.zeros_like(closed)
    return closed & (family.open_probability() <= probability) if draws else closed


def is_shrunk(model: nn.Module) -> bool:
    """Whether units have been removed from a gated model."""
    return hasattr(model, "dampr_layout") or any(of_kind(model, SelectedGate))


def copies_of(given: Copies) -> list[nn.Module]:
    """The averaged copies of a model as a list, without their wrappers. Raises TypeError for anything else."""
    found: list[Any] = _listed(given)
    for one in found:
        if not isinstance(one, nn.Module):
            raise TypeError(
                f"ema={one!r:.80}: expected an AveragedModel or another copy of the model, or a sequence of them"
            )
    return [one.module if isinstance(one, AveragedModel) else one for one in found]


def _listed(given: Any) -> list[Any]:
    """``given`` as a list; a single object becomes a list of one."""
    return list(given) if isinstance(given, (list, tuple)) else [given]


def check_copies(given: Copies, model: nn.Module) -> list[nn.Module]:
    """As :func:`copies_of`; also copies the integer buffers of the model, which must not be averaged, into the copies.

    Raises: ValueError, with the name of a tensor, for a copy whose shapes differ from those of the model.
    """
    found = copies_of(given)
    shapes = shapes_of(model)
    for one in found:
        own = shapes_of(one)
        if own != shapes:
            wrong = next((name for name in {**shapes, **own} if shapes.get(name) != own.get(name)), "")
            raise ValueError(
                f"ema: {wrong!r} is {own.get(wrong)}, expected {shapes.get(wrong)} as in the model, gates included "
                "(hand it to every step)"
            )
        whole_numbers = {
            name: t for name, t in model.named_buffers(remove_duplicate=False) if not t.is_floating_point()
        }
        for name, t in one.named_buffers(remove_duplicate=False):
            if name in whole_numbers:  # indices and counts must not be averages, which are rounded down
                t.copy_(whole_numbers[name])
    return found


def _check_budget(budget: Any, model: nn.Module) -> None:
    """Raise TypeError or ValueError unless ``budget`` is None, or owns the gates of ``model``."""
    if budget is None:
        return
    if not isinstance(budget, Budget):
        raise TypeError(f"budget={budget!r:.80}: expected a dampr.Budget or None")
    if budget.model is not model:
        raise ValueError("budget: it is of another model; expected the one of this model")
    if budget.controller is None:
        raise ValueError(
            "budget: its gates are parameters in an optimizer; expected one with steps=, which owns them, or None"
        )
