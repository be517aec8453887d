"""Supplies the seeds of gates: from a stream of seeds for each gate, or one seed for all calls in a block."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from dampr import philox

from . import ranks, recomputed

REENTRANT_KEPT = 256  # calls of a gate without gradients that a reentrant checkpoint can still ask for


class Stream:
    """The seeds of one gate: ``first``, ``first + 1``, ... Philox makes independent noise of neighbouring seeds.

    The next seed is a buffer of the gate (``next_seed``): a state dict holds it, it moves with the model, and a CUDA
    graph advances it. A Stream holds only what a checkpointed region needs to repeat its draws in the backward: the
    number of each call.

    Args:
        first: the first seed.
        group: the ranks that share a batch; None for all ranks.
    """

    def __init__(self, first: int, group: Sequence[int] | None = None) -> None:
        self.first, self.group = first, group
        self._forget()

    def part(self) -> int:
        """The index of the part of the batch that this process holds (:func:`dampr.gates.ranks.part_of`)."""
        return ranks.part_of(self.group)

    def _forget(self) -> None:
        """Forget all earlier calls."""
        self._calls = 0
        self._numbers: recomputed.Repeats[int] = recomputed.Repeats()
        # calls without gradients: (sequence number of autograd, number of the call)
        self._reentrant: deque[tuple[int, int]] = deque(maxlen=REENTRANT_KEPT)
        self._replayed_reentrant: tuple[Any, int] = (None, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {"first": self.first, "group": self.group}  # a copy has had no calls: graphs belong to the original

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.first, self.group = state["first"], state.get("group")
        self._forget()

    def draw(self, following: Tensor) -> Tensor:
        """The seed of this call, int64 of shape (1,).

        ``following``: the gate's buffer ``next_seed``, int64 (1,). It is advanced in place by 1, unless this call
        repeats an earlier one in the second run of a checkpointed region.
        """
        if torch.compiler.is_compiling():
            return torch.ops.dampr.next_seed(following)  # type: ignore[no-any-return]
        number = self._repeated()
        again = number is not None
        if number is None:
            number, self._calls = self._calls, self._calls + 1
        self._remember(number)
        # Selective checkpointing counts operators, and a repeated draw runs other operators than the first one.
        unseen = _disable_current_modes() if recomputed.any_region() else nullcontext()
        # The counter changes in place, which no transform of torch.func allows.
        with temporarily_clear_interpreter_stack(), torch.no_grad(), unseen:
            return following - (self._calls - number) if again else _advance(following)

    def _remember(self, number: int) -> None:
        """Keep the number of this call for the second run of the checkpointed regions around it."""
        self._numbers.keep(number)
        order = recomputed.region_by_order()
        if order is not None:
            self._reentrant.append((order, number))

    def _repeated(self) -> int | None:
        """The number of the call that this call repeats; None if it repeats none."""
        number, key = self._numbers.find(), recomputed.region_by_node()
        if number is not None or key is None:
            return number
        if len(self._reentrant) == REENTRANT_KEPT and self._reentrant[0][0] > key[0]:
            raise RuntimeError(
                f"a reentrant checkpoint repeats a draw that lies more than {REENTRANT_KEPT} calls of its gate back: "
                "expected use_reentrant=False"
            )
        last, position = self._replayed_reentrant
        position = position + 1 if last == key else 0
        self._replayed_reentrant = key, position
        return recomputed.at([number for order, number in self._reentrant if order > key[0]], position)


def _advance(following: Tensor) -> Tensor:
    """Return a copy of ``following``, int64 (1,), and add 1 to ``following`` in place."""
    seed = following.clone()
    following.add_(1)
    return seed


# Compiled code draws through an operator. torch.compile may recompute copies and sums in the backward instead of saving
# them; a seed that is recomputed after the counter has moved would be another seed.
_LIBRARY = torch.library.Library("dampr", "FRAGMENT")
_LIBRARY.define("next_seed(Tensor(a!) following) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_seeds: recomputed.Repeats[Tensor] = recomputed.Repeats()  # the seeds of compiled calls, of all gates


@torch.library.impl(_LIBRARY, "next_seed", "CompositeExplicitAutograd")
def _next_seed(following: Tensor) -> Tensor:
    """Implementation of ``dampr::next_seed``: return the seed in ``following``, int64 (1,), and advance it in place.

    In the second run of a checkpointed region it returns the seed of the first run.

    Raises: RuntimeError in a reentrant checkpoint.
    """
    if not recomputed.any_region():
        return _advance(following)
    if recomputed.region_by_node() is not None:
        raise RuntimeError("a reentrant checkpoint repeats a draw of a compiled model: expected use_reentrant=False")
    seed = _seeds.find()
    seed = _advance(following) if seed is None else seed
    _seeds.keep(seed)
    return seed.clone()


@torch.library.register_fake("dampr::next_seed", lib=_LIBRARY)
def _next_seed_fake(following: Tensor) -> Tensor:
    """Fake (shape) implementation of ``dampr::next_seed``; ``following`` is the next seed, int64 (1,).

    Raises: RuntimeError in a region that is checkpointed inside of torch.compile. Such a region runs the operator a
    second time in the backward and would get another seed.
    """
    if "recompute" in torch.fx.traceback.get_current_meta():
        raise RuntimeError(
            "a checkpointed region within torch.compile would draw anew in its second run: expected "
            "dampr.hold_draws(model) around the step, or a checkpoint around what is compiled"
        )
    return torch.empty_like(following)


def first_seed(seed: int, number: int) -> int:
    """The first seed of gate ``number`` of a model: 62 bits of Philox with ``seed`` as its key."""
    zero = torch.zeros(1, dtype=torch.int64)
    high, low, *_ = philox.philox4x32(zero + number, zero, zero, zero, torch.tensor([seed]))
    return (int(high) & 0x3FFFFFFF) << 32 | int(low)


def drawing_gates(model: nn.Module) -> list[Any]:
    """The gates of ``model`` that draw noise in training, each once, in the order of its modules.

    For a gate that a budget owns, the list has the gate of the original family (``family``).
    """
    from .base import Gate
    from .owned import OwnedGate

    held = (m.family if isinstance(m, OwnedGate) else m for m in model.modules() if isinstance(m, Gate))
    return [gate for gate in dict.fromkeys(held) if gate.draws_in_training]


@contextmanager
def hold_draws(model: nn.Module) -> Iterator[None]:
    """Every gate of ``model`` draws once, at the beginning of the block, and every call in the block gets that draw.

    Use it for micro-batches that train one network, for several losses of one draw, or to look at the effect of a draw.
    With ``per_sample``, calls with the same number of rows get the same gates in each row. Evaluation mode has no noise
    and does not change. An inner block of the same model keeps the draw of the outer block. Gates that are made within
    the block are not held. Checkpointed regions (``torch.utils.checkpoint``) of the block repeat its draw, even if
    their backward runs after the block; only a reentrant region inside of another reentrant region needs its backward
    within the block.

    A gate class of your own takes part if it gets its noise from :meth:`dampr.gates.Gate.draw_seed`.

    Raises: TypeError unless ``model`` is a module.

    >>> import dampr
    >>> layer = dampr.nn.GatedLinear(8, 4)
    >>> x = torch.randn(2, 8)
    >>> with hold_draws(layer):
    ...     bool((layer(x) == layer(x)).all())
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: expected a torch.nn.Module")
    free = [gate for gate in drawing_gates(model) if gate._held is None or gate._held.value is None]
    begun = []
    if free:
        share_generator(ranks.unwrapped(model))
    try:
        for gate in free:
            gate._begin("_held", gate.draw_seed(gate.device))
            begun.append(gate)
        yield
    finally:
        for gate in begun:
            gate._end("_held")


def gate_generator(model: nn.Module, seed: int | None = 0, *, group: Any = None) -> nn.Module:
    """Give the gates of ``model`` a generator of their own, so that nothing else that draws random numbers changes
    them.

    Without it, each call of a gate takes its seed from torch's global generator: data augmentation, dropout or a second
    model then change the masks. With it, the seed of a call follows from ``seed``, from the number of the gate in the
    model and from the number of draws that the gate has made. Each gate keeps its next seed in a buffer, ``next_seed``:
    a state dict holds it, so a run resumes exactly; it moves with the model; and a copy of the model continues from the
    same seed. No call waits for the device, and CUDA graphs advance the buffer when they are replayed.

    Checkpointed regions (``torch.utils.checkpoint``) repeat their draws in the backward. Under ``torch.compile`` this
    needs either a checkpoint with ``use_reentrant=False`` around the compiled module, or a held draw
    (:func:`hold_draws`); other regions raise RuntimeError.

    Args:
        model: a converted module, with gates. Gates that are added later have no generator; call this function again
            then, which restarts all seeds.
        seed: an integer in [0, 2**63). None: use torch's generator again or, in a process group, the seed on which its
            ranks agree.
        group: a ``torch.distributed`` process group of the ranks that hold equal parts of one batch, such as
            ``mesh["dp"].get_group()``; None: all ranks. Gates per sample are numbered by the rows of the whole batch
            (:meth:`dampr.gates.Gate.index_offset`). Ranks that share the rows of another rank (tensor parallelism) are
            in a group of their own.

    Call it before you load a checkpoint that was made with it. With the same seed, every process has the same masks. In
    a process group of several ranks, :func:`dampr.convert` calls it with the seed that rank 0 gave to
    ``torch.manual_seed``, and a model under DistributedDataParallel without a generator gets one at its first draw. The
    seeds of these two are in no state dict, so they start again in a run that resumes.

    Returns: ``model``.

    Raises: TypeError or ValueError that names the argument; ValueError if no gate of ``model`` draws.

    >>> import dampr
    >>> model = gate_generator(dampr.nn.GatedLinear(8, 4), seed=1)
    >>> [name for name in model.state_dict() if "seed" in name]
    ['gate.next_seed']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.80}: expected a torch.nn.Module")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise ValueError(f"seed={seed!r}: expected None or an int in [0, 2**63)")
    gates = drawing_gates(model)
    if not gates:
        raise ValueError(
            f"model={type(model).__name__}: it has no gates that draw, expected some (dampr.convert makes them)"
        )
    model = ranks.unwrapped(model)
    members = None if group is None else tuple(torch.distributed.get_process_group_ranks(group))
    if seed is None and ranks.several():
        seed = ranks.seed_of(gates)
    for number, gate in enumerate(gates):
        gate._follow(None if seed is None else Stream(first_seed(seed, number), members))
    ranks.watch(model)
    return model


def share_generator(model: nn.Module) -> None:
    """Give each gate of ``model`` that has no generator one that is the same on all ranks.

    It does nothing in a single process.
    """
    if ranks.several():
        gates = drawing_gates(model)
        if any(gate._stream is None for gate in gates):
            seed = ranks.seed_of(gates)
            for number, gate in enumerate(gates):
                if gate._stream is None:
                    gate._follow(Stream(first_seed(seed, number)), persistent=False)
        ranks.watch(model)
