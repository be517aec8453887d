"""Times gated convolutions beside dense, eager unfused and compiled unfused ones: layers, a residual block and whole
networks, all channels last.

Stages of ``python -m benchmarks.run``: ``conv`` (a few layers and a block), ``layers`` (every distinct 3 x 3 and 1 x 1
layer of ResNet-50 at 224 and of VGG16 at 32), ``resnet50`` and ``vgg16`` (whole training steps, dampr's both eagerly
and compiled). A network has its gates where :func:`dampr.convert` puts them, after the norms. The unfused network has
a gate after each of the same norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import dampr
from benchmarks import models
from dampr.bench import linear
from dampr.bench.competitors import UnfusedConv2d, UnfusedGate

Layers = dict[str, Callable[[], nn.Module]]


@dataclass(frozen=True)
class Conv:
    """A convolution of x (B, C, H, H) with N filters; ``name`` is the network that it comes from."""

    name: str
    batch: int
    channels: int
    size: int
    filters: int
    kernel: int
    stride: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C, H, N, kernel, stride), with H twice."""
        return self.batch, self.channels, self.size, self.size, self.filters, self.kernel, self.stride


def distinct(model: nn.Module, size: int, batch: int, name: str) -> list[Conv]:
    """Every 3 x 3 and 1 x 1 convolution of ``model`` on square images of ``size`` pixels, each shape once."""
    found: dict[tuple[int, ...], Conv] = {}

    def note(layer: nn.Conv2d, args: tuple[Tensor, ...], out: Tensor) -> None:
        conv = Conv(
            name, batch, layer.in_channels, args[0].shape[2], layer.out_channels, layer.kernel_size[0], layer.stride[0]
        )
        if conv.kernel in (1, 3):
            found.setdefault(conv.shape, conv)

    layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return list(found.values())


def convolutions(stage: str, device: str) -> list[Conv]:
    """The single layers that a stage times; with a small batch on the CPU."""
    large, small = (64, 512) if device == "cuda" else (4, 32)
    if stage == "layers":
        return distinct(models.resnet50(), 224, large, "ResNet-50") + distinct(models.vgg16(), 32, small, "VGG16")
    if stage == "conv":
        return [
            Conv("ResNet-50", large, 64, 56, 64, 3),
            Conv("ResNet-50", large, 256, 56, 64, 1),
            Conv("VGG16", small, 256, 8, 256, 3),
        ]
    return []


def networks(stage: str, device: str) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """The networks that a stage trains as a whole: name -> (function that builds it, shape of its input)."""
    cuda = device == "cuda"
    if stage == "conv":
        return {"residual block": (lambda: models.BasicBlock(64), (64 if cuda else 8, 64, 56, 56))}
    if stage == "resnet50":
        return {"ResNet-50": (models.resnet50, (256 if cuda else 4, 3, 224, 224))}
    if stage == "vgg16":
        return {"VGG16": (models.vgg16, (512 if cuda else 32, 3, 32, 32))}
    return {}


STAGES = ("conv", "layers", "resnet50", "vgg16")


def run(stage: str, device: str, *, compiled: bool = True, rounds: int = 20) -> list[linear.Point]:
    """The points of a stage: each case per batch and per sample."""
    return [point for case in _cases(stage, device) for point in case(compiled, rounds)]


def _cases(stage: str, device: str) -> Iterator[Callable[[bool, int], list[linear.Point]]]:
    """For each case of a stage, a function of (compiled, rounds) that measures it."""
    for conv in convolutions(stage, device):
        for each in (False, True):
            yield partial(_measure_layer, conv, each, device)
    for name, (build, shape) in networks(stage, device).items():
        for each in (False, True):
            yield partial(_measure_network, name, build, shape, each, device)


def _measure_layer(conv: Conv, per_sample: bool, device: str, compiled: bool, rounds: int) -> list[linear.Point]:
    """The points of one convolution."""
    args = conv.channels, conv.filters, conv.kernel, conv.stride, conv.kernel // 2
    how: dict[str, Any] = {"bias": False, "per_sample": per_sample}
    layers: Layers = {
        "dense": lambda: nn.Conv2d(*args, bias=False),
        "dampr": lambda: dampr.nn.GatedConv2d(*args, **how),
        "eager unfused": lambda: UnfusedConv2d(*args, **how),
    }
    case = f"{conv.name}, {conv.kernel} x {conv.kernel}, {'per sample' if per_sample else 'per batch'}, filter gates"
    x = torch.randn(conv.batch, conv.channels, conv.size, conv.size)
    return measure(case, conv.shape, layers, x, device, compiled, rounds)


def _measure_network(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    per_sample: bool,
    device: str,
    compiled: bool,
    rounds: int,
) -> list[linear.Point]:
    """The points of one network."""
    dense = build()
    example = torch.randn(2, *shape[1:])
    gated = dampr.convert(
        copy.deepcopy(dense), per_sample=per_sample, example_inputs=example, exclude=[nn.Linear]
    ).train()
    norms = [name for name, layer in dampr.prune.gated_layers(gated).items() if isinstance(layer, nn.BatchNorm2d)]

    def unfused() -> nn.Module:
        model = copy.deepcopy(dense)
        for place in norms:
            parent, _, child = place.rpartition(".")
            norm = model.get_submodule(place)
            assert isinstance(norm, nn.BatchNorm2d)
            setattr(model.get_submodule(parent), child, nn.Sequential(norm, UnfusedGate(norm.num_features, per_sample)))
        return model

    layers: Layers = {"dense": lambda: copy.deepcopy(dense), "dampr": lambda: gated, "eager unfused": unfused}
    if compiled:
        layers[linear.COMPILED] = lambda: cast(nn.Module, torch.compile(copy.deepcopy(gated), dynamic=False))
    case = f"{name}, {'per sample' if per_sample else 'per batch'}"
    return measure(case, shape, layers, torch.randn(shape), device, compiled, rounds)


def measure(
    case: str, shape: tuple[int, ...], layers: Layers, x: Tensor, device: str, compiled: bool, rounds: int
) -> list[linear.Point]:
    """The points of competing layers, given by name, in one case: each is built, run once on x and then timed. Images
    are channels last.
    """
    torch.manual_seed(0)
    if compiled:
        torch._dynamo.reset()
        layers = {
            **layers,
            "compiled unfused": lambda: cast(nn.Module, torch.compile(layers["eager unfused"](), dynamic=False)),
        }
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    x = x.to(device).contiguous(memory_format=layout)
    steps: dict[str, linear.Step] = {}
    for name, build in layers.items():
        layer = build().to(device, memory_format=layout).train()  # type: ignore[call-overload]
        with torch.no_grad():
            dy = torch.randn_like(layer(x))
        steps[name] = linear.TrainingStep(layer, x, dy)
        steps[name]()
    return linear.time_steps(case, shape, device, steps, rounds, {})
