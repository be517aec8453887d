"""``python -m benchmarks.steps``: counts what a training step launches, dense and with gates, on the recording driver.

dampr's kernels are launched by Triton on a driver that logs them and runs nothing. torch's operators are counted in the
profiler's tree, those that have a kernel, but neither operators composed of others nor views. All of it is counted on
CPU tensors: one operator counts once, however many kernels cuDNN or cuBLAS would launch for it, in dense and gated
models alike. Operators that wait for a GPU (``item`` and the like), and operators whose output size depends on values
(``nonzero`` and the like), are listed separately. Writes benchmarks/results/emulated/steps.json, which docs/emulated.md
shows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import dampr
from benchmarks import models as networks
from benchmarks.emulated import RESULTS
from dampr import records
from tests.emulator import driver

WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
BY_VALUE = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
}
# Operators that launch no kernel: views, sizes, memory.
_FREE = (
    "view", "_unsafe_view", "as_strided", "t", "transpose", "permute", "expand", "expand_as", "slice", "select",
    "unsqueeze", "squeeze",
    "detach", "detach_", "alias", "split", "split_with_sizes", "chunk", "narrow", "unbind", "unfold", "flatten",
    "reshape", "view_as",
    "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_",
    "result_type",
    "lift_fresh", "is_same_size", "contiguous", "to", "requires_grad_", "numpy_T", "mT", "diagonal", "movedim",
    "as_strided_",
    "resolve_conj", "resolve_neg", "empty_permuted", "unsqueeze_", "squeeze_", "transpose_", "unflatten",
)  # fmt: skip
FREE = {f"aten::{name}" for name in _FREE}

Step = Callable[[nn.Module], torch.Tensor]


def count(model: nn.Module, loss_of: Step, capability: int = 90, bank: dampr.GateBank | None = None) -> dict[str, Any]:
    """What one step launches, after another one as a warm-up: gate draws, forward, penalty and backward. The optimizer
    is left out, as it has fused variants.
    """
    gated = any(isinstance(module, dampr.gates.Gate) for module in model.modules())

    def step() -> None:
        with contextlib.nullcontext() if bank is None else bank.draw():
            loss = loss_of(model)
            if gated:
                loss = loss + 1e-6 * (dampr.penalty(model) if bank is None else bank.penalty())
        loss.backward()
        model.zero_grad()

    with driver.emulated(capability, recording=True) as emulation, dampr.backend("triton"):
        step()
        emulation.take_log()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            step()
    events: list[Any] = list(found.events() or [])
    operators = Counter(name for event in events if event.cpu_parent is None for name in _computing(event))
    return {
        "kernels": dict(emulation.log.launches),
        "operators": dict(operators),
        "waits": dict(Counter(event.name for event in events if event.name in WAITS)),
        "by_value": dict(Counter(event.name for event in events if event.name in BY_VALUE)),
    }


@functools.cache
def has_kernel(name: str) -> bool:
    """Whether an operator counts as one with a kernel of its own; what it calls in turn is then not counted."""
    if name in ("aten::convolution", "aten::convolution_backward"):  # these choose a library
        return True
    overloads = (full for full in torch._C._dispatch_get_all_op_names() if full.split(".")[0] == name)
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU") for full in overloads)


def _computing(event: Any) -> Iterator[str]:
    """The names of the operators that compute something in a tree of events: the outermost ones with a kernel, and
    leaves.
    """
    name, within = event.name, [name for child in event.cpu_children for name in _computing(child)]
    counts = name.startswith("aten::") and name not in FREE and (has_kernel(name) or not within)
    yield from [name] if counts else within


def _images(size: int, classes: int) -> tuple[torch.Tensor, Step]:
    """(a batch of random images, the loss of a model on them)."""
    x, y = torch.randn(2, 3, size, size), torch.randint(classes, (2,))
    return x, lambda model: nn.functional.cross_entropy(model(x), y)


def _resnet50() -> tuple[nn.Module, Any, Step]:
    """(network, example inputs, loss), as all of :data:`MODELS`."""
    return networks.resnet50(), *_images(64, 1000)


def _vgg16() -> tuple[nn.Module, Any, Step]:
    return networks.vgg16(), *_images(32, 10)


def _bert() -> tuple[nn.Module, Any, Step]:
    """BERT of 12 layers with 12 heads, at a third of the width, on which the number of launches does not depend."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1000, hidden_size=192, intermediate_size=768, num_hidden_layers=12, num_attention_heads=12
    )
    inputs = {"input_ids": torch.randint(1000, (2, 32)), "attention_mask": torch.ones(2, 32, dtype=torch.long)}
    labels = torch.randint(2, (2,))
    return (
        BertForSequenceClassification(config),
        inputs,
        lambda model: nn.functional.cross_entropy(model(**inputs).logits, labels),
    )


MODELS = {"ResNet-50": _resnet50, "VGG16": _vgg16, "BERT, 12 layers": _bert}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", default=list(MODELS))
    torch.set_num_threads(1)
    path = RESULTS / "steps.json"
    models = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in parser.parse_args().model:
        torch.manual_seed(0)
        model, inputs, loss_of = MODELS[name]()
        dense = count(model.train(), loss_of)
        for kind in ("per batch", "per batch, GateBank", "per sample"):
            gated = dampr.convert(MODELS[name]()[0], example_inputs=inputs, per_sample=kind == "per sample").train()
            bank = dampr.GateBank(gated) if "GateBank" in kind else None
            title = f"{name}, {kind}"
            layers = sum(isinstance(getattr(module, "gate", None), dampr.gates.Gate) for module in gated.modules())
            models[title] = {"layers": layers, "dense": dense, "gated": count(gated, loss_of, bank=bank)}
            records.write_json(path, {"environment": records.environment(), "models": models})
            print(title, models[title], flush=True)


if __name__ == "__main__":
    main()
