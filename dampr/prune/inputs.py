"""Example inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments;
run and compared.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from dampr.gates.base import GateModule
from dampr.gates.ranks import groups_in
from dampr.nn import GatedSyncBatchNorm

from . import copies, noise
from .meta import OnMeta
from .modules import of_kind

Model = TypeVar("Model", bound=nn.Module)
"""What keeps the type of the model that it is given."""
Found = TypeVar("Found")


def call(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` on the example inputs, as it stands."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def evaluate(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The output tensors in evaluation mode without gradients, as users run a model; modes are given back.

    What a model draws in evaluation mode, as a masked autoencoder does, is the same in every call.
    """
    with evaluating(model), torch.no_grad(), noise.same(model):
        return tensors(call(model, example_inputs))


def copied(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A deep copy of a model, also of one that keeps what it computed: torch copies no tensor that has a graph, and
    such are detached.

    Where that is out of sight, a model with example inputs is run without gradients, which renews what it keeps.
    """
    try:
        return cast(nn.Module, copies.deep(model, _memo(model)))
    except RuntimeError:  # of torch
        if example_inputs is None:
            raise
    evaluate(model, example_inputs)
    return cast(nn.Module, copies.deep(model, _memo(model)))


def twin(model: nn.Module) -> nn.Module:
    """Like :func:`copied`, but with the parameters themselves, so it is cheap, and nothing may write into them."""
    return cast(nn.Module, copies.deep(model, _memo(model) | {id(p): p for p in model.parameters()}))


class Twins:
    """Makes many a :func:`twin` of a model that stays as it is; ``meta``: with parameters and buffers on the meta
    device, which have shapes and no values.
    """

    def __init__(self, model: nn.Module, meta: bool = False) -> None:
        self._model, self._memo = model, _memo(model)
        if not meta:
            self._memo |= {id(p): p for p in model.parameters()}
        for t in itertools.chain(model.parameters(), model.buffers()) if meta else ():
            shapes = t if t.is_meta else t.detach().to("meta")
            of_parameter = isinstance(t, nn.Parameter) and not t.is_meta
            self._memo[id(t)] = nn.Parameter(shapes, t.requires_grad) if of_parameter else shapes

    def make(self) -> nn.Module:
        """A fresh one."""
        return cast(nn.Module, copies.deep(self._model, dict(self._memo)))


def on_shapes(model: nn.Module, example_inputs: Any, run: Callable[[nn.Module, Any], Found]) -> Found:
    """``run(model, example_inputs)`` with a copy of both on the meta device, where operators compute shapes and no
    values. Raises what is raised there, as of a model that asks for values, and what a model says of inputs on a device
    where it is not.
    """
    if not {t.device for t in tensors(example_inputs)} <= {t.device for t in (*model.parameters(), *model.buffers())}:
        evaluate(model, example_inputs)
    with OnMeta():
        return run(Twins(model, meta=True).make(), OnMeta.of(example_inputs))


def without_arithmetic(model: nn.Module, example_inputs: Any, run: Callable[[nn.Module, Any], Found]) -> Found:
    """:func:`on_shapes`, or with the model itself where that raises."""
    try:
        return on_shapes(model, example_inputs, run)
    except Exception:
        return run(model, example_inputs)


def counterparts(copy: nn.Module, model: nn.Module) -> dict[Any, Any]:
    """Of each module and parameter of a copy that of the model."""
    own: dict[Any, Any] = dict(zip(copy.modules(), model.modules(), strict=True))
    return own | dict(zip(copy.parameters(), model.parameters(), strict=True))


def as_trained(model: nn.Module, example_inputs: Any, sure: bool = False) -> nn.Module:
    """What :func:`trained` gives first; ``sure``: without a look at the values, which are known to be finite."""
    return _moved(model) if sure else trained(model, example_inputs)[0]


def trained(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, bool]:
    """A :func:`twin` with values such as training leaves, on which to try what is to hold then.

    A fresh norm shifts by 0, and a fresh branch may end in zeros: what they will add is not to be seen yet. Parameters
    of one dimension, those that are 0 and running statistics get fixed noise; gates stay. The plain twin where the
    model has values that are not finite then, and not before. Also whether all of its outputs are finite.
    """
    moved = _moved(model)
    after = evaluate(moved, example_inputs)
    if all(bool(_wide(t).isfinite().all()) for t in after):
        return moved, True
    plain = twin(model)
    before = evaluate(plain, example_inputs)
    same = all(torch.equal(_wide(a).isfinite(), _wide(b).isfinite()) for a, b in zip(before, after, strict=True))
    return moved if same else plain, False


def _moved(model: nn.Module) -> nn.Module:
    moved = twin(model)
    generator, made = torch.Generator().manual_seed(0), dict[int, nn.Parameter]()

    def noise(t: Tensor) -> Tensor:
        return 0.1 * torch.randn(t.shape, generator=generator).to(t.device, t.dtype)

    with torch.no_grad():
        for module in (module for module in moved.modules() if not isinstance(module, GateModule)):
            for name, p in module._parameters.items():
                if p is not None and p.is_floating_point() and not p.is_meta and (p.dim() < 2 or not bool(p.any())):
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(p + noise(p), requires_grad=p.requires_grad)
                    module._parameters[name] = made[id(p)]
            for name, t in module._buffers.items():
                if name in ("running_mean", "running_var") and t is not None and not t.is_meta:
                    t.mul_(1 + noise(t).abs()) if name == "running_var" else t.add_(noise(t))
    return moved


def _memo(model: nn.Module) -> dict[int, Any]:
    return copies.detached(model) | groups_in(model)


def check(example_inputs: Any) -> None:
    """Raise TypeError unless there is at least one tensor in the example inputs."""
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_inputs)):
        raise TypeError(
            f"example_inputs={example_inputs!r:.80}: expected a tensor, a tuple of positional or a dict of keyword "
            "arguments that holds one"
        )


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of a model's output, in order, whatever holds it: containers, dataclasses, distributions,
    objects with attributes.
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and not isinstance(value, _PLAIN) and id(value) not in seen and depth < DEPTH:
            seen.add(id(value))
            for inner in _inside(value):
                look(inner, depth + 1)

    look(output, 0)
    return found


DEPTH = 8  # of objects in objects in which tensors of an output are looked for
_PLAIN = (str, bytes, int, float, complex, bool, type, nn.Module, torch.dtype, torch.device)


def _inside(value: Any) -> Iterable[Any]:
    """What an object is made of: its items, and the values of its attributes that are not among these.

    Keys and values that a model of transformers caches are no output: they have as many heads as are left.
    """
    if any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers.") for kind in type(value).__mro__):
        return []
    if hasattr(value, "to_tuple"):
        return list(value.to_tuple())
    if isinstance(value, Mapping):
        items = list(value.values())
        return items + [v for v in getattr(value, "__dict__", {}).values() if all(v is not item for item in items)]
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes]
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    return list(getattr(value, "__dict__", {}).values()) + [
        getattr(value, name) for name in slots if hasattr(value, name)
    ]


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def comparable(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """:func:`evaluate`, but an output in which there is nothing to compare raises TypeError by the name of its type."""
    with evaluating(model), torch.no_grad(), noise.same(model):
        output = call(model, example_inputs)
    found = tensors(output)
    if not found:
        raise TypeError(
            f"output of {type(model).__name__}: {type(output).__name__} without a tensor, expected one that can be "
            "compared"
        )
    return found


def perturbed(example_inputs: Any) -> Any:
    """The same inputs with a little fixed noise on every floating-point tensor,
    so that a constant can be told from one row's value.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
            return leaf
        if not leaf.is_floating_point() or not leaf.numel():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
        return leaf.detach() + noise * (0.1 * leaf.detach().abs().mean() + 1e-3)

    return pytree.tree_map(shake, example_inputs)


def differ(a: list[Tensor], b: list[Tensor], rtol: float, atol: float) -> bool:
    """Whether two lists of output tensors differ in number, shape or, beyond the tolerances, value."""
    return len(a) != len(b) or any(
        s.shape != t.shape or not torch.allclose(_wide(s), _wide(t), rtol=rtol, atol=atol, equal_nan=True)
        for s, t in zip(a, b, strict=True)
    )


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of the same shapes; places where both are the same
    infinity, or NaN, do not differ.
    """
    largest = 0.0
    for s, t in zip(a, b, strict=True):
        s, t = _wide(s), _wide(t)
        same = (s == t) | (s.isnan() & t.isnan())
        if not bool(same.all()):
            largest = max(largest, float((s - t)[~same].abs().nan_to_num(math.inf, math.inf).max()))
    return largest


def _wide(t: Tensor) -> Tensor:
    t = t.to_dense() if t.layout != torch.strided else t
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def size(outputs: list[Tensor]) -> float:
    """The largest finite absolute value of all of them; 0 where there is none."""
    finite = [_wide(t).abs() for t in outputs]
    return max((float(t[t.isfinite()].max()) for t in finite if bool(t.isfinite().any())), default=0.0)


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far outputs may be from those of the same function in another order of operations, relative to their size,
by precision.
"""


def tolerances(
    model: nn.Module,
    samples: Sequence[Any],
    atol: float | None,
    rtol: float | None,
    outputs: Iterable[list[Tensor]] | None = None,
) -> tuple[float, float]:
    """(atol, rtol) as given or, where None, by the lowest precision in which the model computes and by the size of
    its outputs (``outputs``: on the samples, where these are known).
    """
    if outputs is None:
        outputs = [evaluate(model, sample) for sample in samples]
    lowest = max((_lowest(model, sample) for sample in samples), key=lambda kind: TOLERANCE[kind])
    largest, relative = max(map(size, outputs)), TOLERANCE[lowest]
    return relative * max(
        largest, 1.0 if lowest is torch.float32 else 0.0
    ) if atol is None else atol, relative if rtol is None else rtol


def _lowest(model: nn.Module, sample: Any) -> torch.dtype:
    """The lowest precision in which a model computes; without arithmetic where it runs so."""

    def look(model: nn.Module, sample: Any) -> torch.dtype:
        with _Precision() as seen, _Autocast() as called:
            evaluate(model, sample)
        if called.autocast and any(p.is_meta for p in model.parameters()):
            raise NotImplementedError("autocast casts nothing on the meta device")
        return seen.lowest

    return without_arithmetic(model, sample, look)


class _Autocast(TorchFunctionMode):
    """Whether autocast was on in some call while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.autocast |= torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        return func(*args, **(kwargs or {}))


class _Precision(TorchDispatchMode):
    """The lowest precision of all floating-point results while it is active, autocast in a forward included."""

    def __init__(self) -> None:
        super().__init__()
        self.lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and TOLERANCE.get(t.dtype, 0.0) > TOLERANCE[self.lowest]:
                self.lowest = t.dtype
        return out


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; each module gets back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def unsynced(model: nn.Module) -> Iterator[None]:
    """In the block synchronised batch norms take the statistics of this process alone: no message, on any device.

    Copies stay that way.
    """
    plain = [module for module in model.modules() if type(module) is nn.SyncBatchNorm]
    gated = [module for module in of_kind(model, GatedSyncBatchNorm) if not module.alone]
    for norm in plain:
        norm.forward = functools.partial(nn.BatchNorm2d.forward, norm)  # type: ignore[method-assign, arg-type]
    for own in gated:
        own.alone = True
    try:
        yield
    finally:
        for norm in plain:
            norm.__dict__.pop("forward", None)
        for own in gated:
            own.alone = False


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient in the block: torch's counter follows those of a module's inputs,
    and readers are found by them.
    """
    asking = [p for p in model.parameters() if p.requires_grad]
    for p in asking:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in asking:
            p.requires_grad_(True)


@contextmanager
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there for the block only."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """No forward hooks for the block: they look on."""
    held = [(m._forward_hooks, dict(m._forward_hooks)) for m in model.modules() if m._forward_hooks]
    try:
        for hooks, _ in held:
            hooks.clear()
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


def looked_at(model: nn.Module, look: Callable[[], Found]) -> Found:
    """What ``look`` gives without forward hooks, or with them where the model does not run without (some collect
    what it returns).
    """
    try:
        with without_hooks(model):
            return look()
    except Exception:
        if not any(module._forward_hooks for module in model.modules()):
            raise
        return look()


@contextmanager
def unfused() -> Iterator[None]:
    """Without torch's fused inference paths for attention and encoder layers, which round in an order of their own."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def replace(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``layers[old]`` in the place of each ``old`` module, under every name it has in ``model``."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])


_HOOKS = [name for name in vars(nn.Module()) if "_hook" in name]


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """What was registered with ``old`` is with ``new``, which takes its place."""
    for attribute in _HOOKS:
        setattr(new, attribute, getattr(old, attribute))
