"""Example inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments; run and compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle


def call(model: nn.Module, example_inputs: Any) -> Any:
    """``model`` on the example inputs, as it stands."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def evaluate(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The output tensors in evaluation mode without gradients, as users run a model; modes are given back."""
    with evaluating(model), torch.no_grad():
        return tensors(call(model, example_inputs))


def copied(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A deep copy of a model, also of one that keeps what it computed: torch copies no tensor that has a graph, and such are detached.

    With example inputs the model is run without gradients first, which renews what it keeps wherever it keeps it.
    """
    if example_inputs is not None:
        with same_noise(model):
            evaluate(model, example_inputs)
    kept = pytree.tree_leaves([list(vars(module).values()) for module in model.modules()])
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf})


def check(example_inputs: Any) -> None:
    """Raise TypeError unless there is at least one tensor in the example inputs."""
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example_inputs)):
        raise TypeError(
            f"example_inputs={example_inputs!r:.80}: expected a tensor, a tuple of positional or a dict of keyword arguments that holds one"
        )


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of a model's output, in order."""
    leaves = pytree.tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def perturbed(example_inputs: Any) -> Any:
    """The same inputs with a little fixed noise on every floating-point tensor, so that a constant can be told from one row's value."""
    generator = torch.Generator().manual_seed(0)

    def shake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
        return leaf.detach() + noise * (0.1 * leaf.detach().abs().mean() + 1e-3)

    return pytree.tree_map(shake, example_inputs)


def differ(a: list[Tensor], b: list[Tensor], rtol: float, atol: float) -> bool:
    """Whether two lists of output tensors differ in number, shape or, beyond the tolerances, value."""
    return len(a) != len(b) or any(
        s.shape != t.shape or not torch.allclose(s.double(), t.double(), rtol=rtol, atol=atol, equal_nan=True)
        for s, t in zip(a, b, strict=True)
    )


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of the same shapes."""
    return max((float((s.double() - t.double()).abs().max()) for s, t in zip(a, b, strict=True) if s.numel()), default=0.0)


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
def removing(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there for the block only."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def same_noise(model: nn.Module) -> AbstractContextManager[None]:
    """Whatever a model draws in evaluation mode, it draws the same in every such block, and the caller's random state is untouched."""
    return torch.random.fork_rng(sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}))
