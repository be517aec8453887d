"""Where the seeds of gates come from: a draw that is held over several calls, and a generator of their own."""

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
    """The seeds of one gate: ``first``, ``first + 1``, ... Philox makes independent noise of neighbouring keys.

    The next seed is a buffer of the gate, so a state dict holds it, it moves with the model, and a CUDA graph advances
    it. Here is only what a checkpointed region needs to draw again what it drew: of each call its number.
    """

    def __init__(self, first: int, group: Sequence[int] | None = None) -> None:
        self.first, self.group = first, group  # ``group``: the ranks that share a batch; None: all
        self._forget()

    def part(self) -> int:
        """Which part of the batch this process has."""
        return ranks.part_of(self.group)

    def _forget(self) -> None:
        self._calls = 0
        self._numbers: recomputed.Repeats[int] = recomputed.Repeats()
        # (place in the order of autograd, call) without gradients
        self._reentrant: deque[tuple[int, int]] = deque(maxlen=REENTRANT_KEPT)
        self._replayed_reentrant: tuple[Any, int] = (None, 0)

    def __getstate__(self) -> dict[str, Any]:
        return {"first": self.first, "group": self.group}  # a copy has had no calls: graphs belong to the original

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.first, self.group = state["first"], state.get("group")
        self._forget()

    def draw(self, following: Tensor) -> Tensor:
        """The seed of this call, of shape (1,); ``following``, the next seed,
        moves on unless the call is a repeated one.
        """
        if torch.compiler.is_compiling():
            return torch.ops.dampr.next_seed(following)  # type: ignore[no-any-return]
        number = self._repeated()
        again = number is not None
        if number is None:
            number, self._calls = self._calls, self._calls + 1
        self._remember(number)
        # Selective checkpointing counts operators, of which a second run has others here.
        unseen = _disable_current_modes() if recomputed.any_region() else nullcontext()
        # no transform of torch.func may see a counter that moves
        with temporarily_clear_interpreter_stack(), torch.no_grad(), unseen:
            return following - (self._calls - number) if again else _advance(following)

    def _remember(self, number: int) -> None:
        self._numbers.keep(number)
        order = recomputed.region_by_order()
        if order is not None:
            self._reentrant.append((order, number))

    def _repeated(self) -> int | None:
        """The number of the call that this one repeats; None for a new one."""
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
    seed = following.clone()
    following.add_(1)
    return seed


# What is compiled draws by an operator. torch.compile computes copies and sums of its inputs again in the backward
# rather than keeping them, and a seed that is computed again after the counter has moved is another one.
_LIBRARY = torch.library.Library("dampr", "FRAGMENT")
_LIBRARY.define("next_seed(Tensor(a!) following) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_seeds: recomputed.Repeats[Tensor] = recomputed.Repeats()  # of compiled calls, whichever gates


@torch.library.impl(_LIBRARY, "next_seed", "CompositeExplicitAutograd")
def _next_seed(following: Tensor) -> Tensor:
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
    if "recompute" in torch.fx.traceback.get_current_meta():
        raise RuntimeError(
            "a checkpointed region within torch.compile would draw anew in its second run: expected "
            "dampr.hold_draws(model) around the step, or a checkpoint around what is compiled"
        )
    return torch.empty_like(following)


def first_seed(seed: int, number: int) -> int:
    """Where gate ``number`` starts: 62 bits of Philox with ``seed`` as its key."""
    zero = torch.zeros(1, dtype=torch.int64)
    high, low, *_ = philox.philox4x32(zero + number, zero, zero, zero, torch.tensor([seed]))
    return (int(high) & 0x3FFFFFFF) << 32 | int(low)


def drawing_gates(model: nn.Module) -> list[Any]:
    """The gates of ``model`` that draw in training, each once, in the order of its modules;
    owned ones are the families behind them.
    """
    from .base import Gate
    from .owned import OwnedGate

    held = (m.family if isinstance(m, OwnedGate) else m for m in model.modules() if isinstance(m, Gate))
    return [gate for gate in dict.fromkeys(held) if gate.draws_in_training]


@contextmanager
def hold_draws(model: nn.Module) -> Iterator[None]:
    """Every gate of ``model`` draws once, at the beginning of the block, and has that draw in each call within it.

    For micro-batches that are to train one network, for several losses of one draw, for looking at what a draw does.
    With ``per_sample`` each row has the same gates in calls of as many rows. Evaluation mode has no noise and is what
    it always is. Inside another block of the same model the draw is the outer block's. Gates that are made within the
    block are not held. Checkpointed regions (``torch.utils.checkpoint``) of the block have its draw again, also where
    their backward comes later; only
    reentrant regions inside of reentrant regions need their backward in the block.

    A family of your own is held if it asks :meth:`dampr.gates.Gate.draw_seed` for its noise.

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

    Without it each call of a gate takes its seed from torch's global generator: data augmentation, dropout or a second
    model then change the masks. With it the seed follows from ``seed``, the number of the gate in the model and how
    many draws it has had. The last two are one buffer of each gate, ``next_seed``: it is part of the state dict, so
    that a run resumes to the bit, it moves with the model, and copies go on where the original was. No call waits for
    the device, and CUDA graphs advance it as they are replayed. Checkpointed regions (``torch.utils.checkpoint``) draw
    again what they drew. Under ``torch.compile`` the region has to be around what is compiled, with
    ``use_reentrant=False``, or the draw to be held (:func:`hold_draws`); other regions raise RuntimeError.

    Args:
        model: a module with gates, converted before. Gates that are added later have no generator; call this again, it
            starts over.
        seed: an integer in [0, 2**63); None: back to torch's generator, or, in a process group, to the seed that its
            ranks agree on.
        group: a ``torch.distributed`` process group of the ranks that each have as large a part of the batch, such as
            ``mesh["dp"].get_group()``; None: all ranks. Gates per sample are numbered by the rows of the whole batch
            (:meth:`dampr.gates.Gate.index_offset`). Ranks that are not in it, but share the rows of one that is (tensor
            parallelism), have a group of their own.

    Call it before loading a checkpoint that was made with it. With the same seed every process has the same masks. In a
    process group of several ranks :func:`dampr.convert` does so with the seed that rank 0 gave to
    ``torch.manual_seed``, and a model under DistributedDataParallel that has no generator gets one with the first draw;
    these two are in no state dict, and begin anew in a run that resumes.

    Returns: ``model``.

    Raises: TypeError or ValueError that names the argument, also where no gate of ``model`` draws.

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
    """In a process group of several ranks, give gates of ``model`` that have no generator one that all ranks have."""
    if ranks.several():
        gates = drawing_gates(model)
        if any(gate._stream is None for gate in gates):
            seed = ranks.seed_of(gates)
            for number, gate in enumerate(gates):
                if gate._stream is None:
                    gate._follow(Stream(first_seed(seed, number)), persistent=False)
        ranks.watch(model)
