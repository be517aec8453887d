"""A dynamic size takes a route that is right for all sizes: nothing is compiled for a few of them,
and export keeps its batch free.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import dampr
from dampr import nn as gated

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own, of what it traces
SIZES = [2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 20, 31, 33, 40, 50, 64, 65, 100, 128, 200]
LAYERS: dict[str, Any] = {
    "linear": (lambda: gated.GatedLinear(8, 16), lambda: nn.Linear(8, 16), (8,)),
    "linear, wide": (lambda: gated.GatedLinear(64, 64), lambda: nn.Linear(64, 64), (64,)),
    "conv, stride 2": (lambda: gated.GatedConv2d(8, 8, 3, stride=2), lambda: nn.Conv2d(8, 8, 3, stride=2), (8, 6, 6)),
}


def compilations(layer: nn.Module, shape: tuple[int, ...], dynamic: bool | None, training: bool) -> int:
    """How often a layer is compiled over 20 batch sizes, whose outputs and gradients are those of an eager one."""
    count = [0]

    def counting(graph: Any, example: Any) -> Any:
        count[0] += 1
        return aot_eager(graph, example)

    torch._dynamo.reset()
    layer.train(training)
    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True, backend=counting)
    for size in SIZES:
        x = torch.randn(size, *shape)
        found = []
        for run in (layer, compiled):
            torch.manual_seed(5)
            y = run(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-4)
    return count[0]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", LAYERS)
def test_batch_sizes_cost_at_most_one_compilation_more_than_those_of_the_dense_layer(
    name: str, dynamic: bool | None
) -> None:
    build, dense, shape = LAYERS[name]
    layer = build()
    layer.gate.log_alpha.data.uniform_(-1, 2)
    for training in (True, False):
        assert compilations(layer, shape, dynamic, training) <= compilations(dense(), shape, dynamic, training) + 1


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        return self.last(h + self.second(h))


@pytest.mark.parametrize("gate", ["hard_concrete", "dep_l0"])
def test_a_model_with_tied_gates_compiles_for_all_sizes(gate: str) -> None:
    torch._dynamo.reset()
    model = dampr.convert(Residual(), example_inputs=torch.randn(4, 8), gate=gate)
    assert model.first.gate is model.second.gate
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in (4, 7, 20):
        x = torch.randn(size, 8)
        found = []
        for run in (model, compiled):
            torch.manual_seed(5)
            y = run(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def images() -> nn.Sequential:
    layers = [
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    ]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("compacted", [False, True])
def test_export_keeps_a_dynamic_batch(compacted: bool, strict: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 3, 9, 9)
    model = dampr.convert(images(), example_inputs=x)
    for module in model.modules():
        if isinstance(module, dampr.gates.HardConcrete):
            module.log_alpha.data[::2] = -9.0
    model = dampr.compact(model, example_inputs=x) if compacted else model
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},), strict=strict)
    for size in (2, 64, 300):
        x = torch.randn(size, 3, 9, 9)
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: dampr.nn.GatedLinear(6, 8),
        lambda: dampr.nn.GatedLinear(6, 8, granularity="input", per_sample=True),
        lambda: dampr.nn.GatedLinear(6, 8, granularity="weight"),
        lambda: dampr.nn.GatedLayerNorm(6),
        lambda: dampr.nn.GatedBatchNorm1d(6, activation="relu"),
        lambda: dampr.nn.GatedActivation(6, dim=-1),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), dampr.nn.GatedConv1d(2, 4, 2)),
    ],
)
def test_what_is_exported_in_training_learns(layer: Any, strict: bool) -> None:
    """As torch.distributed.pipelining trains the parts of a model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = dampr.gate_generator(nn.Sequential(nn.Linear(6, 6), layer()), seed=1), torch.randn(4, 6)
    for gate in dampr.gates.draws.drawing_gates(model):
        nn.init.normal_(gate.log_alpha)
    exported = torch.export.export(model, (x,), strict=strict).module()
    for run in (exported, model):
        run(x).square().sum().backward()
    found = dict(exported.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name].grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


class First(nn.Module):
    """The first output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *x: torch.Tensor) -> Any:
        y = self.layer(*x)
        return y[0] if isinstance(y, tuple) else y


TOKENS = (3, 5, 8)
EXPORTED: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "linear of tokens": (lambda: gated.GatedLinear(8, 4), TOKENS, (0, 1)),
    "linear of grids": (lambda: gated.GatedLinear(8, 4, granularity="input"), (2, 3, 5, 8), (0, 1, 2)),
    "linear, per sample": (lambda: gated.GatedLinear(8, 4, per_sample=True), TOKENS, (0, 1)),
    "linear, blocks": (lambda: gated.GatedLinear(8, 4, granularity=(2, 2)), TOKENS, (0, 1)),
    "linear, dam": (lambda: gated.GatedLinear(8, 4, gate="dam"), TOKENS, (0, 1)),
    "conv1d": (lambda: gated.GatedConv1d(5, 4, 1), TOKENS, (0, 2)),
    "conv2d, per sample": (lambda: gated.GatedConv2d(3, 4, 1, per_sample=True), (2, 3, 5, 8), (0, 2, 3)),
    "layer norm": (lambda: gated.GatedLayerNorm(8), TOKENS, (0, 1)),
    "batch norm": (lambda: gated.GatedBatchNorm1d(5), TOKENS, (0, 2)),
    "gate": (lambda: gated.GatedActivation(8, dim=-1, per_sample=True), TOKENS, (0, 1)),
    "residual": (lambda: gated.GatedResidual(nn.Linear(8, 8), per_sample=True), TOKENS, (0, 1)),
    "encoder": (lambda: gated.GatedTransformerEncoderLayer(8, 2, 6, 0.0), TOKENS, (0, 1)),
    "gru": (lambda: gated.GatedGRU(8, 4), TOKENS, (1,)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", EXPORTED)
def test_export_keeps_every_dynamic_size(name: str, training: bool) -> None:
    build, shape, free = EXPORTED[name]
    layer = First(build().train(training))
    sizes = {dim: torch.export.Dim(f"size_{dim}", min=1, max=4096) for dim in free}
    exported = torch.export.export(layer, (torch.randn(shape),), dynamic_shapes=((sizes,),))
    for factor in (1, 7):
        x = torch.randn([n * factor if dim in free else n for dim, n in enumerate(shape)])
        y = exported.module()(x)
        assert y.shape == layer(x).shape
        if not training:
            torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
def test_a_compacted_model_is_compiled_ahead_of_time(tmp_path: Any) -> None:
    x = torch.randn(4, 6)
    model = dampr.convert(
        nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)), example_inputs=x
    )
    model[1].gate.log_alpha.data[::2] = -9.0
    small = dampr.compact(model.eval(), example_inputs=x)
    assert small[0].out_features == 8
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=4096)},))
    loaded = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "small.pt2"))
    )
    for size in (3, 50):
        x = torch.randn(size, 6)
        torch.testing.assert_close(loaded(x), small(x), rtol=1e-5, atol=1e-6)
