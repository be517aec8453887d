"""Fuse ReLU modules into the gated batch norms in front of them: norm, gates and ReLU are then one pass over memory."""

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

from . import attributes, hooks, inputs, noise
from .modules import is_exactly


def fuse_relu(model: nn.Module, gated: Mapping[nn.Module, Any], example_inputs: Any) -> dict[nn.Module, nn.Module]:
    """Let batch norms compute the ReLU that follows them, where nothing else reads their output.

    Only an ``nn.ReLU`` module can be fused, also one that is called in several places. A function in a forward cannot
    be left out, and a norm with hooks is not changed, because they would see other values.

    Args:
        model: the model, with its plain norms.
        gated: plain module -> the gated layer that will take its place; ``activation`` is set on batch norms among
            these.
        example_inputs: the inputs on which readers are found.

    Returns: ``nn.ReLU`` -> the :class:`~dampr.nn.AbsorbedReLU` to put in its place.
    """
    names = {module: name for name, module in model.named_modules()}
    norms = {
        names[plain]: layer
        for plain, layer in gated.items()
        if isinstance(layer, GatedBatchNorm) and not hooks.sees_outputs(plain)
    }
    found = _followers(model, norms, example_inputs) if norms else {}
    for norm in found:
        norms[norm].activation, norms[norm].followed = "relu", True
    absorbed: dict[nn.Module, nn.Module] = {}
    for name in dict.fromkeys(found.values()):
        relu: Any = model.get_submodule(name)
        absorbed[relu] = AbsorbedReLU(relu.inplace).train(relu.training)
        hooks.share(relu, absorbed[relu])
        attributes.carry(relu, absorbed[relu])
    return absorbed


def _followers(model: nn.Module, norms: Iterable[str], example_inputs: Any) -> dict[str, str]:
    """name of a norm -> name of the ReLU that alone reads it, in evaluation and in training.

    Found by a run of a copy in each mode; empty if one of them raises.
    """
    if not any(is_exactly(m, (nn.ReLU, AbsorbedReLU)) for m in model.modules()):
        return {}
    found = []
    for training in (False, True):
        try:
            with noise.same(model), torch.no_grad():
                found.append(_alone(inputs.twin(model).train(training), norms, example_inputs))
        except Exception:
            # A model that cannot train on the example inputs (too few of them for a norm, say) gains nothing here.
            return {}
    evaluated, trained = found
    return {norm: relu for norm, relu in evaluated.items() if trained.get(norm) == relu}


def _alone(model: nn.Module, norms: Iterable[str], example_inputs: Any) -> dict[str, str]:
    """name of a norm -> name of the ReLU that follows it, found in one run of ``model``.

    It holds norms that are called once, whose output one call of a ReLU module reads, and whose output nothing keeps.
    """
    made: dict[str, list[weakref.ref[Tensor]]] = {}
    behind: dict[str, str] = {}
    reads: dict[str, list[Callable[..., Any]]] = {name: [] for name in norms}

    def whose(values: Any) -> list[str]:
        """The norms whose outputs are among the tensors in ``values``."""
        leaves = {id(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
        return [
            name
            for name, outputs in made.items()
            if any(output() is not None and id(output()) in leaves for output in outputs)
        ]

    class Reading(TorchFunctionMode):
        """A mode that notes the functions that read each norm's output."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            """Call the function, and note it for each norm whose output is among the arguments."""
            for name in whose((args, kwargs)):
                reads[name].append(func)
            return func(*args, **(kwargs or {}))

    def note(relu: str, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a ReLU: note that it follows the norms whose outputs it gets."""
        behind.update(dict.fromkeys(whose((args, kwargs)), relu))

    def is_alone(norm: str) -> bool:
        """Whether nothing but the ReLU read the norm's output, and nothing has kept it."""
        (output,) = made[norm]
        # an inplace ReLU writes into the norm's output, so whatever reads that later reads the rectified values
        if model.get_submodule(behind[norm]).inplace:
            return reads[norm][:1] == [F.relu]
        return reads[norm] == [F.relu] and output() is None

    for name, module in model.named_modules():
        if name in reads:
            module.register_forward_hook(lambda _, args, y, name=name: made.setdefault(name, []).append(weakref.ref(y)))
        elif is_exactly(module, (nn.ReLU, AbsorbedReLU)):
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True
            )
    with Reading():
        outputs = inputs.call(model, example_inputs)
    alone = [norm for norm in behind if len(made[norm]) == 1 and is_alone(norm)]
    del outputs  # kept alive until here, so that a norm's output that the model returns counts as kept
    return {norm: behind[norm] for norm in alone}
