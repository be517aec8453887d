"""ReLU modules that batch norms with gates take in, so that norm, gates and ReLU are one pass each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dampr.nn import TakenReLU
from dampr.nn.norm import _GatedBatchNorm

from . import inputs
from .graph import Widths


def take_in(model: nn.Module, widths: Widths | None, gated: Mapping[nn.Module, Any], example_inputs: Any) -> dict[nn.Module, nn.Module]:
    """Tell the batch norms among the ``gated`` layers, by the plain ones, that a ReLU alone reads them; what is to stand in its place.

    Only an ``nn.ReLU`` of its own, or one that is called in several places: each call does what is left to do. A function cannot be left
    out.
    """
    norms = {plain: layer for plain, layer in gated.items() if isinstance(layer, _GatedBatchNorm)}
    alone = [plain for plain in norms if widths is not None and widths.feeds_a_relu(plain)]
    found = _behind(model, alone, example_inputs) if alone else {}
    for norm in found:
        norms[norm].activation, norms[norm].followed = "relu", True
    taken: dict[nn.Module, nn.Module] = {}
    for relu in dict.fromkeys(found.values()):
        taken[relu] = TakenReLU(relu.inplace).train(relu.training)
        inputs.keep_hooks(relu, taken[relu])
    return taken


def _behind(model: nn.Module, norms: list[nn.Module], example_inputs: Any) -> dict[nn.Module, nn.ReLU]:
    """The ReLU module that reads what a norm returns, and nothing in between."""
    made: list[tuple[Tensor, nn.Module]] = []
    found: dict[nn.Module, nn.ReLU] = {}

    def note(norm: nn.Module, _: Any, y: Tensor) -> None:
        made.append((y, norm))

    def look(relu: nn.ReLU, args: tuple[Any, ...]) -> None:
        found.update({norm: relu for y, norm in made if args and args[0] is y})

    relus = [m for m in model.modules() if type(m) in (nn.ReLU, TakenReLU)]
    hooks = [norm.register_forward_hook(note) for norm in norms]
    hooks += [relu.register_forward_pre_hook(look) for relu in relus]  # type: ignore[arg-type]
    with inputs.removing(hooks), inputs.same_noise(model):
        inputs.evaluate(model, example_inputs)
    return found
