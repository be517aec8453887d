"""ReLU modules that batch norms with gates compute, so that norm, gates and ReLU are one pass each way."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dampr.nn import AbsorbedReLU
from dampr.nn.batch_norm import GatedBatchNorm

from . import inputs, noise


def fuse_relu(model: nn.Module, gated: Mapping[nn.Module, Any], example_inputs: Any) -> dict[nn.Module, nn.Module]:
    """Tell the batch norms among the ``gated`` layers, by the plain ones, that a ReLU alone reads them; what is to
    stand in its place.

    Only an ``nn.ReLU`` of its own, or one that is called in several places: each call does what is left to do. A
    function cannot be left out, and a norm with hooks, which would see other values, keeps its output.
    """
    names = {module: name for name, module in model.named_modules()}
    norms = {
        names[plain]: layer
        for plain, layer in gated.items()
        if isinstance(layer, GatedBatchNorm) and not _is_hooked(plain)
    }
    found = _followers(model, norms, example_inputs) if norms else {}
    for norm in found:
        norms[norm].activation, norms[norm].followed = "relu", True
    absorbed: dict[nn.Module, nn.Module] = {}
    for name in dict.fromkeys(found.values()):
        relu: Any = model.get_submodule(name)
        absorbed[relu] = AbsorbedReLU(relu.inplace).train(relu.training)
        inputs.keep_hooks(relu, absorbed[relu])
    return absorbed


def _is_hooked(norm: nn.Module) -> bool:
    return bool(norm._forward_hooks or norm._backward_hooks or norm._backward_pre_hooks)


def _followers(model: nn.Module, norms: Iterable[str], example_inputs: Any) -> dict[str, str]:
    """The ReLU behind each norm that nothing else reads, in evaluation and in training, by their names;
    tried in a copy.
    """
    if not any(type(m) in (nn.ReLU, AbsorbedReLU) for m in model.modules()):
        return {}
    found = []
    for training in (False, True):
        try:
            with noise.same(model), torch.no_grad():
                found.append(_alone(inputs.twin(model).train(training), norms, example_inputs))
        except Exception:
            # what does not train on the example inputs (too few of them for a norm, say) has nothing to gain
            return {}
    evaluated, trained = found
    return {norm: relu for norm, relu in evaluated.items() if trained.get(norm) == relu}


def _alone(model: nn.Module, norms: Iterable[str], example_inputs: Any) -> dict[str, str]:
    """Of norms that are called once, and whose output one call of a ReLU module reads, and nobody keeps,
    that module.
    """
    made: dict[str, list[weakref.ref[Tensor]]] = {}
    behind: dict[str, str] = {}
    reads: dict[str, list[Callable[..., Any]]] = {name: [] for name in norms}

    def whose(values: Any) -> list[str]:
        leaves = {id(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
        return [
            name
            for name, outputs in made.items()
            if any(output() is not None and id(output()) in leaves for output in outputs)
        ]

    class Reading(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for name in whose((args, kwargs)):
                reads[name].append(func)
            return func(*args, **(kwargs or {}))

    def note(relu: str, args: Any) -> None:
        behind.update(dict.fromkeys(whose(args), relu))

    def is_alone(norm: str) -> bool:
        (output,) = made[norm]
        # who comes after it reads what it has rectified, in the same memory
        if model.get_submodule(behind[norm]).inplace:
            return reads[norm][:1] == [F.relu]
        return reads[norm] == [F.relu] and output() is None

    for name, module in model.named_modules():
        if name in reads:
            module.register_forward_hook(lambda _, args, y, name=name: made.setdefault(name, []).append(weakref.ref(y)))
        elif type(module) in (nn.ReLU, AbsorbedReLU):
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
    with Reading():
        outputs = inputs.call(model, example_inputs)
    alone = [norm for norm in behind if len(made[norm]) == 1 and is_alone(norm)]
    del outputs  # held until here: what is returned is read
    return {norm: behind[norm] for norm in alone}
