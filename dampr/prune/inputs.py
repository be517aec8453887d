"""Run models on example inputs, copy models, and compare their outputs.

Example inputs are a tensor, a tuple or list of positional arguments, a dict of keyword arguments, or :class:`Several`
of these; tensors may lie in objects among them. The functions here run a model on them without leaving a trace: modes,
random generators and hooks are afterwards as before.
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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dampr.gates.base import GateModule
from dampr.gates.ranks import groups_in
from dampr.nn import GatedSyncBatchNorm

from . import attributes, copies, hooks, noise
from .meta import OnMeta
from .modules import of_kind
from .restore import as_it_was
from .values import tensors, with_tensors

Model = TypeVar("Model", bound=nn.Module)
"""A type variable: a function that takes a ``Model`` returns the same type of model."""
Found = TypeVar("Found")


class Several:
    """Example inputs for a model that one call does not show: one that takes another way for another task, say.

    It stands wherever example inputs are expected. The model is called with each in turn, so its cost is that of all
    these calls. ``dampr.convert(model, dampr.Several(x, {"x": x, "task": "depth"}))``

    Args:
        examples: each a tensor, a tuple of positional or a dict of keyword arguments.

    Raises: TypeError without any, or for one without a tensor.
    """

    def __init__(self, *examples: Any) -> None:
        if not examples:
            raise TypeError("examples=(): expected at least one")
        for one in examples:
            check(one)
        self.examples = examples


def call(model: nn.Module, example_inputs: Any) -> Any:
    """The output of ``model`` on the example inputs, in its present mode and with gradients as they are set; a list of
    outputs for :class:`Several`.
    """
    if isinstance(example_inputs, Several):
        return [call(model, one) for one in example_inputs.examples]
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def evaluate(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The output tensors of ``model`` in evaluation mode without gradients. Afterwards the model is as it was, whatever
    it writes into buffers and attributes.

    Random numbers that a model draws in evaluation mode, as a masked autoencoder does, are the same in every call.
    """
    with as_it_was(model), evaluating(model), torch.no_grad():
        return tensors(call(model, example_inputs))


def copied(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A deep copy of a model, also of one whose attributes hold tensors that were computed with gradients.

    ``copy.deepcopy`` refuses such tensors, so the copy gets detached ones. If one of them is too deep in other objects
    to be found, the model is run on ``example_inputs`` without gradients, which replaces what it keeps, and copied
    again.

    Raises: RuntimeError of torch if that is needed and ``example_inputs`` is None.
    """
    try:
        return cast(nn.Module, copies.deep(model, _memo(model)))
    except RuntimeError:  # torch cannot copy tensors with a graph
        if example_inputs is None:
            raise
    with evaluating(model), torch.no_grad(), noise.same(model):
        call(model, example_inputs)
    return cast(nn.Module, copies.deep(model, _memo(model)))


def twin(model: nn.Module) -> nn.Module:
    """As :func:`copied`, but the copy shares its parameters with ``model``. The copy is cheap; nothing may write into
    its parameters.
    """
    return cast(nn.Module, copies.deep(model, _memo(model) | {id(p): p for p in model.parameters()}))


class Twins:
    """Makes any number of copies of a model that does not change in the meantime.

    Args:
        model: the model.
        meta: False: copies share the parameters with ``model``, as :func:`twin`. True: copies have parameters and
            buffers on the meta device, with shapes and without values.
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
        """A new copy."""
        return cast(nn.Module, copies.deep(self._model, dict(self._memo)))


def on_shapes(model: nn.Module, example_inputs: Any, run: Callable[[nn.Module, Any], Found]) -> Found:
    """``run(model, example_inputs)`` with copies of both on the meta device, where operators compute shapes and no
    values.

    Raises: what is raised there, for example by a model whose control flow asks for values. If the inputs are on a
    device where the model has no tensor, the model itself is run first and may raise.
    """
    if not {t.device for t in tensors(example_inputs)} <= {t.device for t in (*model.parameters(), *model.buffers())}:
        evaluate(model, example_inputs)
    with OnMeta():
        return run(Twins(model, meta=True).make(), OnMeta.of(example_inputs))


def without_arithmetic(model: nn.Module, example_inputs: Any, run: Callable[[nn.Module, Any], Found]) -> Found:
    """:func:`on_shapes`; if that raises, ``run(model, example_inputs)`` with the model itself."""
    try:
        return on_shapes(model, example_inputs, run)
    except Exception:
        return run(model, example_inputs)


def counterparts(copy: nn.Module, model: nn.Module) -> dict[Any, Any]:
    """A dict from each module and parameter of a copy to that of ``model``."""
    own: dict[Any, Any] = dict(zip(copy.modules(), model.modules(), strict=True))
    return own | dict(zip(copy.parameters(), model.parameters(), strict=True))


def as_trained(model: nn.Module, example_inputs: Any, sure: bool = False) -> nn.Module:
    """The model that :func:`trained` returns. With ``sure``, its outputs are taken to be finite and are not
    computed.
    """
    return _moved(model) if sure else trained(model, example_inputs)[0]


def trained(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, bool]:
    """A copy of ``model`` with values such as training leaves, for trials of what must hold after training.

    In a fresh model norms shift by 0 and branches may end in zeros, so a trial would not show what they add later.
    Parameters with one dimension, parameters that are all 0, and running statistics therefore get fixed noise. Gates
    keep their values.

    Returns: (the copy, whether all of its outputs are finite). If the noise makes outputs infinite or NaN that were
    finite before, or if the model raises with it, the copy has the values of ``model``.
    """
    moved = _moved(model)
    try:
        after = evaluate(moved, example_inputs)
    except Exception:  # a factorisation that needs certain values, say
        return twin(model), False
    if all(bool(_wide(t).isfinite().all()) for t in after):
        return moved, True
    plain = twin(model)
    before = evaluate(plain, example_inputs)
    same = all(torch.equal(_wide(a).isfinite(), _wide(b).isfinite()) for a, b in zip(before, after, strict=True))
    return moved if same else plain, False


def _moved(model: nn.Module) -> nn.Module:
    """A :func:`twin` of ``model`` with the noise that :func:`trained` describes."""
    moved = twin(model)
    generator, made = torch.Generator().manual_seed(0), dict[int, nn.Parameter]()

    def noise(t: Tensor) -> Tensor:
        """Normal noise of deviation 0.1 in the shape of ``t``."""
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
    """The objects that a deep copy of ``model`` must not copy as usual: id -> what stands for the object in the copy (a
    detached tensor, or the same process group).
    """
    return copies.detached(model) | groups_in(model)


def check(example_inputs: Any) -> None:
    """Raise TypeError unless there is at least one tensor in the example inputs."""
    if not tensors(example_inputs):
        raise TypeError(
            f"example_inputs={example_inputs!r:.80}: expected a tensor, a tuple of positional or a dict of keyword "
            "arguments that holds one"
        )


def comparable(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """As :func:`evaluate`, for outputs that are to be compared.

    Raises: TypeError with the type of the output if it holds no tensor.
    """
    with as_it_was(model), evaluating(model), torch.no_grad():
        output = call(model, example_inputs)
    found = tensors(output)
    if not found:
        raise TypeError(
            f"output of {type(model).__name__}: {type(output).__name__} without a tensor, expected one that can be "
            "compared"
        )
    return found


def samples(model: nn.Module, example_inputs: Any) -> list[Any]:
    """The inputs on which a model is compared with another: the example inputs, and the same :func:`perturbed`.

    If the model raises on those (it takes images between 0 and 1, say), the noise stays between the lowest and the
    highest value of each tensor; if it raises then too, the example inputs are alone.
    """
    for inside in (False, True):
        found = perturbed(example_inputs, inside)
        try:
            evaluate(model, found)
        except Exception:
            continue
        return [example_inputs, found]
    return [example_inputs]


def perturbed(example_inputs: Any, inside: bool = False) -> Any:
    """The same inputs with a little fixed noise on every floating-point tensor.

    An output that is constant on the example inputs only by chance, because of their values, then changes. ``inside``:
    the noise does not leave the range of a tensor's values.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(leaf: Tensor) -> Tensor:
        """A tensor of the inputs with noise; others than dense floating-point tensors are returned as they are."""
        if leaf.layout != torch.strided or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
        shaken = leaf.detach() + noise * (0.1 * leaf.detach().abs().mean() + 1e-3)
        return shaken.clamp(leaf.detach().min(), leaf.detach().max()) if inside else shaken

    return with_tensors(shake, example_inputs)


def differ(a: list[Tensor], b: list[Tensor], rtol: float, atol: float) -> bool:
    """Whether two lists of output tensors differ in number, in shape, or in value by more than the tolerances."""
    return len(a) != len(b) or any(
        s.shape != t.shape or not torch.allclose(_wide(s), _wide(t), rtol=rtol, atol=atol, equal_nan=True)
        for s, t in zip(a, b, strict=True)
    )


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of the same shapes.

    Elements where both are NaN, or the same infinity, count as equal.
    """
    largest = 0.0
    for s, t in zip(a, b, strict=True):
        s, t = _wide(s), _wide(t)
        same = (s == t) | (s.isnan() & t.isnan())
        if not bool(same.all()):
            largest = max(largest, float((s - t)[~same].abs().nan_to_num(math.inf, math.inf).max()))
    return largest


def _wide(t: Tensor) -> Tensor:
    """The tensor, dense, in float64 or complex128."""
    t = t.to_dense() if t.layout != torch.strided else t
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def size(outputs: list[Tensor]) -> float:
    """The largest finite absolute value in all tensors; 0 if there is none."""
    finite = [_wide(t).abs() for t in outputs]
    return max((float(t[t.isfinite()].max()) for t in finite if bool(t.isfinite().any())), default=0.0)


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""dtype -> the largest difference, relative to the size of outputs, between two orders of the same operations."""


def tolerances(
    model: nn.Module,
    samples: Sequence[Any],
    atol: float | None,
    rtol: float | None,
    outputs: Iterable[list[Tensor]] | None = None,
) -> tuple[float, float]:
    """(atol, rtol) for comparing outputs of ``model``.

    Args:
        model: the model.
        samples: example inputs.
        atol, rtol: returned as given, unless None: then they follow from the lowest precision in which the model
            computes, and ``atol`` also from the largest output.
        outputs: the outputs on ``samples``, if they are known.
    """
    if outputs is None:
        outputs = [evaluate(model, sample) for sample in samples]
    lowest = max((_lowest(model, sample) for sample in samples), key=lambda kind: TOLERANCE[kind])
    largest, relative = max(map(size, outputs)), TOLERANCE[lowest]
    return relative * max(
        largest, 1.0 if lowest is torch.float32 else 0.0
    ) if atol is None else atol, relative if rtol is None else rtol


def _lowest(model: nn.Module, sample: Any) -> torch.dtype:
    """The lowest precision in which a model computes; found on meta tensors if the model runs so."""

    def look(model: nn.Module, sample: Any) -> torch.dtype:
        """The lowest precision on one run. Raises NotImplementedError on meta tensors under autocast, which casts
        nothing there.
        """
        with _Precision() as seen, _Autocast() as called:
            evaluate(model, sample)
        if called.autocast and any(p.is_meta for p in model.parameters()):
            raise NotImplementedError("autocast casts nothing on the meta device")
        return seen.lowest

    return without_arithmetic(model, sample, look)


class _Autocast(TorchFunctionMode):
    """A mode that notes whether autocast was on during any torch call; ``autocast`` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.autocast |= torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        return func(*args, **(kwargs or {}))


class _Precision(TorchDispatchMode):
    """A mode that notes the lowest floating-point precision of all results in ``lowest``, also inside of autocast."""

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
    """A block with the model in evaluation mode; afterwards each module is in its old mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def unsynced(model: nn.Module) -> Iterator[None]:
    """A block in which synchronised batch norms use the statistics of this process alone, so no rank waits for others.

    Copies that are made in the block stay that way.
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
    """A block in which no parameter requires a gradient.

    torch's FLOP counter adds hooks to module inputs that require gradients, and the readers of a layer are found by
    such inputs; parameters must not interfere.
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
def quiet(model: nn.Module, example_inputs: Any) -> Iterator[None]:
    """A block without the users' forward hooks if these change nothing.

    They change something if the model has other outputs on the example inputs without them, or does not run. A model
    that returns what a hook has collected is such a model. All hooks stay then.
    """
    if not any(hooks.of_users(model)) or not _only_observe(model, example_inputs):
        yield
        return
    with hooks.without(model):
        yield


def _only_observe(model: nn.Module, example_inputs: Any) -> bool:
    """Whether the model has the same outputs without its users' forward hooks."""
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return False
    with unfused():  # torch leaves a fused path where a layer has hooks, and that rounds in another order
        expected = evaluate(model, example_inputs)
        try:
            with hooks.without(model):
                found = evaluate(model, example_inputs)
        except Exception:
            return False
    return len(found) == len(expected) and all(map(_equal, found, expected))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in every bit that matters: NaN is equal to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and not differ([a], [b], 0.0, 0.0)


@contextmanager
def unfused() -> Iterator[None]:
    """A block without torch's fused inference paths for attention and encoder layers, which round in another order."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def replace(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``layers[old]`` in place of each ``old`` module, under every name it has in ``model``, with the hooks and
    attributes that users have put on it.
    """
    for old, new in layers.items():
        hooks.copy(old, new)
        attributes.carry_all(old, new)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in layers:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])
