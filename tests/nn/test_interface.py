"""The interface of the dense layers, whole: torch's own list of how each module is made and called, held to by the
gated one.

``torch.testing._internal.common_modules.module_db`` is in the wheel; it asks for ``expecttest``, of which it needs one
name.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils import _pytree as pytree

import dampr
from dampr import gates
from dampr import nn as gated

PAIRS: dict[type[nn.Module], Any] = {
    nn.Linear: gated.GatedLinear,
    nn.Conv1d: gated.GatedConv1d,
    nn.Conv2d: gated.GatedConv2d,
    nn.Conv3d: gated.GatedConv3d,
    nn.ConvTranspose1d: gated.GatedConvTranspose1d,
    nn.ConvTranspose2d: gated.GatedConvTranspose2d,
    nn.ConvTranspose3d: gated.GatedConvTranspose3d,
    nn.BatchNorm1d: gated.GatedBatchNorm1d,
    nn.BatchNorm2d: gated.GatedBatchNorm2d,
    nn.BatchNorm3d: gated.GatedBatchNorm3d,
    nn.LayerNorm: gated.GatedLayerNorm,
    nn.Embedding: gated.GatedEmbedding,
    nn.RNN: gated.GatedRNN,
    nn.GRU: gated.GatedGRU,
    nn.LSTM: gated.GatedLSTM,
    nn.MultiheadAttention: gated.GatedMultiheadAttention,
    nn.TransformerEncoderLayer: gated.GatedTransformerEncoderLayer,
    nn.TransformerDecoderLayer: gated.GatedTransformerDecoderLayer,
}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def module_db() -> list[Any]:
    if "expecttest" not in sys.modules:
        try:
            importlib.import_module("expecttest")
        except ImportError:
            stand_in: Any = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase
            sys.modules["expecttest"] = stand_in
    found: list[Any] = importlib.import_module("torch.testing._internal.common_modules").module_db
    return found


def cases(training: bool) -> Iterator[Any]:
    for info in module_db():
        if info.module_cls not in PAIRS:
            continue
        torch.manual_seed(0)
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training)
        for number, case in enumerate(inputs):
            yield pytest.param(info.module_cls, case, id=f"{info.module_cls.__name__}-{number}")


def pair(kind: Any, case: Any, training: bool = False) -> tuple[nn.Module, nn.Module]:
    """A dense layer, and a gated one that is made with the same arguments and loads its state."""
    made = case.constructor_input
    dense: nn.Module = kind(*made.args, **made.kwargs)
    other: nn.Module = PAIRS[kind](*made.args, **made.kwargs)
    assert not other.load_state_dict(dense.state_dict(), strict=True).unexpected_keys
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, gates.HardConcrete):
                module.log_alpha.fill_(100.0)  # open in every draw
    return dense.train(training), other.train(training)


def tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def called(module: nn.Module, case: Any, change: Any = lambda t: t) -> tuple[list[Tensor], list[Any]]:
    """What a layer gives for a case, and the gradients of inputs and dense parameters."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda t: change(t.detach().clone()), (case.forward_input.args, case.forward_input.kwargs)
    )
    leaves = [t.requires_grad_() for t in tensors((args, kwargs)) if t.is_floating_point()]
    torch.manual_seed(1)
    out = [t for t in tensors(module(*args, **kwargs)) if t.is_floating_point()]
    wanted = leaves + [p for n, p in module.named_parameters() if ".gate." not in f".{n}"]
    total = sum((t * torch.arange(1, t.numel() + 1).view(t.shape).cos()).sum() for t in out)
    found = (
        torch.autograd.grad(total, wanted, allow_unused=True)
        if isinstance(total, Tensor) and total.requires_grad
        else []
    )
    return out, list(found)


def assert_same(
    found: tuple[list[Any], list[Any]], expected: tuple[list[Any], list[Any]], strides: bool = True
) -> None:
    assert not strides or [t.stride() for t in found[0]] == [t.stride() for t in expected[0]]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        if a is not b:  # not None both: a gradient that torch leaves out is 0
            torch.testing.assert_close(b * 0 if a is None else a, a * 0 if b is None else b, rtol=1e-4, atol=2e-5)


def strided(t: Tensor) -> Tensor:
    """The same values, every second element of a larger tensor."""
    return t.repeat_interleave(2, dim=-1)[..., ::2] if t.dim() and t.is_floating_point() else t


@pytest.mark.parametrize(("kind", "case"), list(cases(False)))
def test_evaluation_is_that_of_torchs_layer(kind: Any, case: Any) -> None:
    dense, other = pair(kind, case)
    assert_same(called(other, case), called(dense, case))
    # Of inputs with holes torch's own functions leave holes in some outputs.
    assert_same(called(other, case, strided), called(dense, case, strided), strides=False)


@pytest.mark.parametrize(("kind", "case"), list(cases(True)))
def test_training_with_open_gates_is_that_of_torchs_layer(kind: Any, case: Any) -> None:
    dense, other = pair(kind, case, training=True)
    assert_same(called(other, case), called(dense, case))
    for (name, t), (_, moved) in zip(dense.named_buffers(), ((n, b) for n, b in other.named_buffers()), strict=True):
        torch.testing.assert_close(t, moved, msg=name)


@pytest.mark.parametrize(("kind", "case"), list(cases(False)))
def test_copies_pickles_states_and_precision(kind: Any, case: Any) -> None:
    dense, other = pair(kind, case)
    expected = called(other, case)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert_same(called(twin, case), expected)
    own = PAIRS[kind](*case.constructor_input.args, **case.constructor_input.kwargs).eval()
    own.load_state_dict(other.state_dict())
    assert_same(called(own, case), expected)
    assert list(dense.state_dict()) == [key for key in other.state_dict() if "gate." not in key]
    if not any(isinstance(t, Tensor) for t in case.constructor_input.kwargs.values()):
        wide = PAIRS[kind](
            *case.constructor_input.args, **case.constructor_input.kwargs, dtype=torch.float64, device="meta"
        )
        for name, t in wide.state_dict().items():
            assert t.is_meta
            assert t.dtype == (
                torch.float32 if "gate." in name else dense.state_dict()[name].to(torch.float64).dtype
            ) or name.endswith("tracked")


EMPTY = {
    nn.Linear: ((4, 3), (0, 4)),
    nn.Conv1d: ((4, 3, 2), (0, 4, 5)),
    nn.Conv2d: ((4, 3, 2), (0, 4, 5, 5)),
    nn.LayerNorm: ((4,), (0, 4)),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_batch_is_served_as_torch_serves_it(kind: Any) -> None:
    arguments, shape = EMPTY[kind]
    case = types.SimpleNamespace(
        constructor_input=types.SimpleNamespace(args=arguments, kwargs={}),
        forward_input=types.SimpleNamespace(args=(torch.randn(shape),), kwargs={}),
    )
    for training in (False, True):
        dense, other = pair(kind, case, training)
        assert_same(called(other, case), called(dense, case))


FAMILIES: dict[str, Any] = {
    "hard_concrete": lambda n: gates.HardConcrete(n),
    "droprate": lambda n: gates.HardConcrete(n, droprate=0.3),
    "dep_l0": lambda n: gates.DependencyGenerator([3, n], bias_init=1.0).gates()[1],
    "dam": lambda n: gates.DiscriminativeMask(n, init_beta=0.25),
    "diffprune": lambda n: gates.DiffPrune(n, stochastic=True, init_sigma=0.2),
    "diffmask": lambda n: gates.DifferentiableMask(
        n, slope_mode="scheduled", threshold_mode="trainable", init_alpha=0.7
    ),
    "diffmask-trainable": lambda n: gates.DifferentiableMask(n, slope_mode="trainable"),
    "owned": lambda n: gates.OwnedGate(gates.HardConcrete(n, init_log_alpha=0.5)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gate_from_the_meta_device_has_fresh_values_after_reset(name: str) -> None:
    torch.manual_seed(3)
    fresh = FAMILIES[name](4)
    torch.manual_seed(3)
    made = FAMILIES[name](4).to("meta").to_empty(device="cpu")
    for module in made.modules():
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            t.data.fill_(float("nan"))
    torch.manual_seed(3)
    for module in list(made.modules()) if name == "dep_l0" else [made]:
        if isinstance(module, gates.DependencyGenerator) or name != "dep_l0":
            module.reset_parameters()
    for key, value in fresh.state_dict().items():
        assert torch.equal(made.state_dict()[key], value), key
    assert torch.equal(made.deterministic(), fresh.deterministic())


def test_resetting_a_gate_of_a_generator_leaves_the_other_layers_of_it() -> None:
    first, second = gates.DependencyGenerator([3, 4]).gates()
    before = {name: p.clone() for name, p in first.generator.named_parameters()}
    second.reset_parameters()
    changed = {name for name, p in first.generator.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"weight_1", "bias_1"}


def test_a_family_without_reset_says_so() -> None:
    class Own(gates.Gate):
        def __init__(self, num_gates: int, *, device: Any = None) -> None:
            super().__init__(num_gates)
            self.logit = nn.Parameter(torch.zeros(num_gates, device=device))

        def forward(self, rows: int | None = None) -> Tensor:
            return self.logit.sigmoid()

    with pytest.raises(NotImplementedError, match=r"^Own has no reset_parameters\(\)"):
        gated.GatedLinear(3, 2, gate=Own).reset_parameters()


LAYERS: dict[str, Any] = {
    "linear": lambda: gated.GatedLinear(4, 3),
    "index": lambda: gated.GatedLinear(4, 3, granularity=torch.arange(12).view(3, 4) % 5),
    "conv": lambda: gated.GatedConv2d(4, 3, 2),
    "batch norm": lambda: gated.GatedBatchNorm1d(4),
    "layer norm": lambda: gated.GatedLayerNorm(4),
    "embedding": lambda: gated.GatedEmbedding(4, 3),
    "lstm": lambda: gated.GatedLSTM(4, 3),
    "attention": lambda: gated.GatedMultiheadAttention(4, 2),
    "gate": lambda: gated.GatedActivation(2, dim=-1, index=torch.tensor([0, 1, 1, 0])),
    "residual": lambda: gated.GatedResidual(nn.Linear(4, 4)),
    "encoder": lambda: gated.GatedTransformerEncoderLayer(4, 2, 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_from_the_meta_device_is_a_fresh_one_after_reset(name: str) -> None:
    """As FSDP and every other deferred initialisation does it: each module that has a reset is asked for one."""
    with torch.device("meta"):
        torch.manual_seed(1)
    made = LAYERS[name]().to("meta").to_empty(device="cpu")
    for t in (*made.parameters(), *made.buffers()):
        if t.is_floating_point():
            t.data.fill_(float("nan"))
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif hasattr(module, "_reset_parameters"):
            module._reset_parameters()
    assert all(bool(t.isfinite().all()) for t in (*made.parameters(), *made.buffers()))
    expected = LAYERS[name]()
    for key, value in expected.named_buffers():
        torch.testing.assert_close(dict(made.named_buffers())[key], value)
    for module in made.modules():
        if isinstance(module, gates.HardConcrete):
            assert bool((module.log_alpha == 3).all())


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_of_a_layer_includes_its_gate(name: str) -> None:
    made = LAYERS[name]()
    if not hasattr(made, "gate"):
        made = made.self_attn
    made.gate.log_alpha.data.fill_(-1.0)
    made.reset_parameters()
    assert bool((made.gate.log_alpha == 3).all())


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_loads_and_leaves_the_gates(assign: bool) -> None:
    dense = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for gate in ("hard_concrete", "dep_l0"):
        made = nn.Sequential(gated.GatedLinear(4, 3, gate=gate), gated.GatedBatchNorm1d(3))
        made[1].gate.log_alpha.data.fill_(0.25)
        made.load_state_dict(dense.state_dict(), strict=True, assign=assign)
        assert torch.equal(made[0].weight, dense[0].weight)
        assert bool((made[1].gate.log_alpha == 0.25).all())


def test_a_gated_state_that_lost_its_gates_does_not_load_and_half_precision_does_not_reach_them() -> None:
    made = gated.GatedLinear(4, 3)
    state = made.state_dict()
    lost = {key: value for key, value in state.items() if "gate" not in key}
    half = copy.copy(state)
    for key, value in state.items():
        half[key] = value.bfloat16()
    twin = gated.GatedLinear(4, 3)
    twin.load_state_dict(half, assign=True)
    assert twin.weight.dtype == torch.bfloat16
    assert twin.gate.log_alpha.dtype == torch.float32
    twin.load_state_dict(lost, strict=True)
    state.pop("gate.log_alpha")
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict(state, strict=True)


@pytest.mark.parametrize("gate", ["hard_concrete", "dep_l0"])
def test_a_meta_model_is_converted_then_made_real(gate: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = dampr.convert(model, gate=gate).to_empty(device="cpu")
    dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.load_state_dict(dense.state_dict())
    x = torch.randn(5, 4)
    torch.testing.assert_close(model.eval()(x), dense(x))


def test_a_meta_model_that_cannot_be_converted_is_refused_in_words_and_unchanged() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    kinds = [type(m) for m in model]
    with pytest.raises(dampr.ConversionError, match="^model is on the meta device"):
        dampr.convert(model, example_inputs=torch.randn(2, 4))
    with pytest.raises(
        ValueError, match=r"^gate=DiscriminativeMask: fresh gates are not 1, and parameters on the meta device"
    ):
        dampr.convert(model, gate="dam")
    assert [type(m) for m in model] == kinds


WRAPPED: dict[str, Any] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm by hooks": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
DENSE: list[Any] = [(lambda: nn.Linear(6, 4), (3, 6)), (lambda: nn.Conv2d(6, 4, 3), (2, 6, 5, 5))]


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize(("build", "shape"), DENSE, ids=["linear", "conv"])
def test_a_gated_layer_takes_what_torch_wraps_around_a_weight(name: str, build: Any, shape: Any) -> None:
    torch.manual_seed(0)
    dense = build()
    kind = PAIRS[type(dense)]
    other = kind.from_dense(copy.deepcopy(dense))
    other.gate.log_alpha.data.fill_(100.0)
    found = []
    for layer in (dense, other):
        torch.manual_seed(2)
        wrapped = WRAPPED[name](layer)
        for mode in (True, False):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).requires_grad_()
            y = wrapped.train(mode)(x)
            own = [p for n, p in wrapped.named_parameters() if "gate." not in n]
            found.append((y, torch.autograd.grad(y.square().sum(), [x, *own])))
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-4, atol=1e-5)
    twin = kind.from_dense(build())
    twin = WRAPPED[name](twin).eval()
    twin.load_state_dict(other.state_dict())
    torch.testing.assert_close(twin(x), found[3][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.to_dense()(x), found[3][0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_gated_layer_takes_the_weight_norm_of_hooks() -> None:
    layer = gated.GatedLinear(6, 4)
    layer.gate.log_alpha.data.fill_(100.0)
    plain, x = layer.to_dense(), torch.randn(3, 6)
    wrapped = nn.utils.weight_norm(layer)
    torch.testing.assert_close(wrapped(x), plain(x))
    wrapped(x).sum().backward()
    assert wrapped.weight_g.grad is not None
    torch.testing.assert_close(nn.utils.remove_weight_norm(wrapped)(x), plain(x))


@pytest.mark.parametrize("name", WRAPPED)
def test_convert_leaves_a_wrapped_layer_and_its_buffers_as_they_are(name: str) -> None:
    """Reading such a weight in training mode moves the vectors of spectral_norm,
    and once changed the model that convert then refused.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        WRAPPED[name](nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    ).train()
    model(torch.randn(3, 6))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 6)
    dampr.convert(model, example_inputs=x, tie=False)  # by gated layers alone
    how = "weight_norm, spectral_norm or prune" if "hooks" in name or name == "prune" else "torch.nn.utils.parametrize"
    assert (
        model.dampr_skipped["0"] == f"its weight is computed from other tensors ({how}); wrap the gated layer instead"
    )
    with pytest.raises(TypeError, match="^layer=(Parametrized)?Linear: "):
        gated.GatedLinear.from_dense(model[0])
    assert isinstance(model[2], gated.GatedLinear)
    assert model.training
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("rows", [(0,), (1,), (5,), (2, 0), (2, 3), (40,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_output_may_be_changed_in_place(dtype: Any, rows: Any, per_sample: bool, training: bool) -> None:
    layer = PAIRS[nn.Linear](10, 14, per_sample=per_sample, dtype=dtype).train(training)
    layer.gate.log_alpha.data[:3] = -9
    x = torch.randn(*rows, 10, dtype=dtype, requires_grad=True)
    grads = []
    for activation in (torch.relu, torch.relu_):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(activation(layer(x)).square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
