"""Second derivatives of every op are those of the dense op times its gates, written out, for the same draw;
the first stay fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dampr
from dampr import functional, gates, philox, reference
from dampr.nn import GatedLinear
from dampr.ops import forced_route
from dampr.spec import hard_concrete, mask, ramp

Data = dict[str, Tensor]
SEED = 5


def drawn(gate: Tensor, rows: int | None = None, flip: int = 0) -> Tensor:
    """Louizos et al. 2018, eq. 10-12, as it stands there."""
    n = gate.numel()
    u = philox.uniform(torch.tensor([SEED ^ flip]), n * (rows or 1)).double()
    s = torch.sigmoid((torch.logit(u if rows is None else u.view(rows, n)) + gate) * 1.5)
    return (s * 1.2 - 0.1).clamp(0, 1)


def blocks(z: Tensor, rows: int, cols: int) -> Tensor:
    """Gates of 2 x 2 blocks as a matrix."""
    grid = z.view(-(rows // -2), -(cols // -2))
    return grid.repeat_interleave(2, 0)[:rows].repeat_interleave(2, 1)[:, :cols]


def normed(x: Tensor, weight: Tensor, bias: Tensor, statistics: bool) -> Tensor:
    """Batch norm written out, by the statistics of x or by a mean of 0.5 and a variance of 2."""
    shared = [i for i in range(x.dim()) if i != 1]
    mean, var = (x.mean(shared), x.var(shared, correction=0)) if statistics else (torch.tensor(0.5), torch.tensor(2.0))
    one = [1, -1, *[1] * (x.dim() - 2)]
    mean, var = (t.double().expand(x.shape[1]).view(one) for t in (mean, var))
    return (x - mean) / (var + 1e-5).sqrt() * weight.view(one) + bias.view(one)


def batch_norm(training: bool, **how: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        kept = (
            {}
            if training
            else {"running_mean": torch.full((5,), 0.5).double(), "running_var": torch.full((5,), 2.0).double()}
        )
        return functional.gated_batch_norm(x, gate, weight, bias, **kept, training=training, seed=SEED, **how)

    return call


LINEAR = {"x": (3, 4), "weight": (5, 4), "bias": (5,)}
IMAGES = {"x": (2, 4, 4, 3), "weight": (5, 4, 2, 2), "bias": (5,)}
NORMS = {"x": (3, 5, 2, 2), "weight": (5,), "bias": (5,), "gate": (5,)}
FLIP = philox.SECOND_STREAM
# Of each op: the shapes of its tensors, the op, and the same written out.
CASES: dict[str, tuple[dict[str, tuple[int, ...]], Callable[..., Any], Callable[..., Any]]] = {
    "sample_gates": ({"gate": (7,)}, lambda gate: functional.sample_gates(gate, seed=SEED), drawn),
    "sample_gates, rows": (
        {"gate": (4,)},
        lambda gate: functional.sample_gates(gate, seed=SEED, rows=3),
        lambda gate: drawn(gate, 3),
    ),
    "open_probability": (
        {"gate": (4,)},
        lambda gate: functional.open_probability(gate),
        lambda gate: torch.sigmoid(gate - 2 / 3 * torch.tensor(0.1 / 1.1).double().log()),
    ),
    "linear, output": (
        LINEAR | {"output_gate": (5,)},
        lambda **data: functional.gated_linear(**data, seed=SEED),
        lambda x, weight, bias, output_gate: F.linear(x, weight, bias) * drawn(output_gate),
    ),
    "linear, input": (
        LINEAR | {"input_gate": (4,)},
        lambda **data: functional.gated_linear(**data, seed=SEED),
        lambda x, weight, bias, input_gate: F.linear(x * drawn(input_gate), weight, bias),
    ),
    "linear, both, per sample": (
        LINEAR | {"input_gate": (4,), "output_gate": (5,)},
        lambda **data: functional.gated_linear(**data, seed=SEED, per_sample=True),
        lambda x, weight, bias, input_gate, output_gate: (
            F.linear(x * drawn(input_gate, 3), weight, bias) * drawn(output_gate, 3, FLIP)
        ),
    ),
    "linear, weight": (
        LINEAR | {"weight_gate": (20,)},
        lambda **data: functional.gated_linear(**data, seed=SEED),
        lambda x, weight, bias, weight_gate: F.linear(x, weight * drawn(weight_gate).view(5, 4), bias),
    ),
    "linear, blocks": (
        LINEAR | {"weight_gate": (6,)},
        lambda **data: functional.gated_linear(**data, seed=SEED, block=(2, 2)),
        lambda x, weight, bias, weight_gate: F.linear(x, weight * blocks(drawn(weight_gate), 5, 4), bias),
    ),
    "conv1d": (
        {"x": (2, 4, 6), "weight": (5, 4, 2), "bias": (5,), "output_gate": (5,)},
        lambda **data: functional.gated_conv1d(**data, seed=SEED, stride=2),
        lambda x, weight, bias, output_gate: F.conv1d(x, weight, bias, 2) * drawn(output_gate).view(-1, 1),
    ),
    "conv2d, filters": (
        IMAGES | {"output_gate": (5,)},
        lambda **data: functional.gated_conv2d(**data, seed=SEED, padding=1),
        lambda x, weight, bias, output_gate: F.conv2d(x, weight, bias, padding=1) * drawn(output_gate).view(-1, 1, 1),
    ),
    "conv2d, channels": (
        IMAGES | {"input_gate": (4,)},
        lambda **data: functional.gated_conv2d(**data, seed=SEED),
        lambda x, weight, bias, input_gate: F.conv2d(x * drawn(input_gate).view(-1, 1, 1), weight, bias),
    ),
    "conv2d, per sample": (
        IMAGES | {"output_gate": (5,)},
        lambda **data: functional.gated_conv2d(**data, seed=SEED, per_sample=True),
        lambda x, weight, bias, output_gate: F.conv2d(x, weight, bias) * drawn(output_gate, 2).view(2, 5, 1, 1),
    ),
    "conv2d, weight": (
        IMAGES | {"weight_gate": (80,)},
        lambda **data: functional.gated_conv2d(**data, seed=SEED),
        lambda x, weight, bias, weight_gate: F.conv2d(x, weight * drawn(weight_gate).view(weight.shape), bias),
    ),
    "conv2d, blocks": (
        IMAGES | {"weight_gate": (6,)},
        lambda **data: functional.gated_conv2d(**data, seed=SEED, block=(2, 2)),
        lambda x, weight, bias, weight_gate: F.conv2d(
            x, weight * blocks(drawn(weight_gate), 5, 4)[..., None, None], bias
        ),
    ),
    "activations": (
        {"x": (3, 4, 2), "gate": (4,)},
        lambda x, gate: functional.gate_activations(x, gate, seed=SEED),
        lambda x, gate: x * drawn(gate).view(-1, 1),
    ),
    "activations, per sample": (
        {"x": (3, 4, 2), "gate": (4,)},
        lambda x, gate: functional.gate_activations(x, gate, seed=SEED, per_sample=True),
        lambda x, gate: x * drawn(gate, 3).unsqueeze(-1),
    ),
    "affine": (
        {"gate": (9,), "weight": (9,), "bias": (9,)},
        lambda **data: torch.cat(functional.gated_affine(**data, seed=SEED)),  # type: ignore[arg-type]
        lambda gate, weight, bias: torch.cat([weight * drawn(gate), bias * drawn(gate)]),
    ),
    "batch norm, training": (
        NORMS,
        batch_norm(True),
        lambda x, weight, bias, gate: normed(x, weight, bias, True) * drawn(gate).view(-1, 1, 1),
    ),
    "batch norm, evaluation, per sample, ReLU": (
        NORMS,
        batch_norm(False, per_sample=True, activation="relu"),
        lambda x, weight, bias, gate: F.relu(normed(x, weight, bias, False) * drawn(gate, 3).view(3, 5, 1, 1)),
    ),
    "batch norm, training, per sample, ReLU": (
        NORMS,
        batch_norm(True, per_sample=True, activation="relu"),
        lambda x, weight, bias, gate: F.relu(normed(x, weight, bias, True) * drawn(gate, 3).view(3, 5, 1, 1)),
    ),
}
ROUTES = [
    *[("linear, output", name) for name in ("small", "fold", "activations", "live")],
    *[("linear, input", name) for name in ("small", "fold", "activations", "live")],
    *[("conv2d, filters", name) for name in ("fold", "activations", "live")],
]


def data_of(name: str) -> Data:
    generator = torch.Generator().manual_seed(len(name))
    return {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in CASES[name][0].items()}


def derivatives(function: Callable[..., Tensor], data: Data) -> dict[str, Tensor]:
    """y, the gradients alone, and with a graph, and the gradients of a product of these with numbers,
    by every input and by that of y.
    """
    leaves = {name: t.clone().requires_grad_() for name, t in data.items()}
    y = function(**leaves)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).requires_grad_()
    alone = torch.autograd.grad(y, list(leaves.values()), dy.detach(), retain_graph=True)
    first = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
    total = sum((g * torch.linspace(1, -2, g.numel(), dtype=g.dtype).view(g.shape)).sum() for g in first)
    second = torch.autograd.grad(total, [*leaves.values(), dy], materialize_grads=True, allow_unused=True)
    found = {"y": y.detach()}
    for kind, grads in (("d", alone), ("d with a graph", first), ("dd", second)):
        found |= {f"{kind} {name}": g.detach() for name, g in zip([*leaves, "dy"], grads, strict=False)}
    return found


def same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, t in found.items():
        torch.testing.assert_close(t, right[name], rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_those_of_the_op_written_out(name: str, cpu_backend: str) -> None:
    _, function, truth = CASES[name]
    right = derivatives(truth, data_of(name))
    assert any(t.abs().max() > 1e-3 for key, t in right.items() if key.startswith("dd "))
    same(derivatives(function, data_of(name)), right)


@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_on_every_route(name: str, route: str) -> None:
    if dampr.backend_info()["cpp"].startswith("missing"):
        pytest.skip("no extension")
    _, function, truth = CASES[name]
    with forced_route(route):
        same(derivatives(function, data_of(name)), derivatives(truth, data_of(name)))


@pytest.mark.parametrize("name", [name for name in CASES if "ReLU" not in name])
def test_gradgradcheck(name: str, cpu_backend: str) -> None:
    names, function = list(CASES[name][0]), CASES[name][1]
    leaves = [t.requires_grad_() for t in data_of(name).values()]
    assert torch.autograd.gradgradcheck(
        lambda *given: function(**dict(zip(names, given, strict=True))), leaves, fast_mode=True
    )


SPECS = {
    "paper": hard_concrete("paper"),
    "median": hard_concrete("median"),
    "beta": hard_concrete(beta=0.4),
    "tanh": ramp("tanh", 2.0),
    "ratio": ramp("ratio", 3.0),
    "exponential": ramp("exponential", 2.0),
    "smooth": mask("smooth", 2.0),
    "logistic": mask("logistic", 2.0),
    "exact_zero": mask("exact_zero", 2.0),
}


@pytest.mark.parametrize("spec", SPECS)
def test_second_derivatives_of_every_family(spec: str, cpu_backend: str) -> None:
    given = torch.linspace(-2.2, 2.3, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda p: functional.sample_gates(p, seed=SEED, spec=SPECS[spec]), given)


def test_a_rule_without_a_gradient_has_no_second_one(cpu_backend: str) -> None:
    log_alpha, x = torch.tensor([-1.0, 2.0], requires_grad=True), torch.ones(1, 2, requires_grad=True)
    z = functional.sample_gates(log_alpha, spec=hard_concrete("binary"))
    first = torch.autograd.grad((x * z).square().sum(), (x, log_alpha), create_graph=True)
    second = torch.autograd.grad(first[0].sum() + first[1].sum(), (x, log_alpha))
    assert torch.equal(first[1], torch.zeros(2))
    assert torch.equal(second[0], torch.tensor([[0.0, 2.0]]))
    assert torch.equal(second[1], torch.zeros(2))


def test_the_generator_of_dep_l0(cpu_backend: str) -> None:
    generator = gates.DependencyGenerator([5, 4])
    parameters = [p.detach().double().requires_grad_() for p in generator.parameters()]
    limit = 4.6
    assert torch.autograd.gradgradcheck(
        lambda *p: tuple(dampr.ops.dependency_generator(p, limit)), parameters, fast_mode=True
    )
    leaves = list(generator.double().parameters())
    found = torch.autograd.grad(generator()[1].square().sum(), leaves, create_graph=True)
    plain = [p.detach().clone().requires_grad_() for p in leaves]
    truth = reference.dependency_generator(plain, gates.hard_concrete.LOGIT_LIMIT)[1]
    right = torch.autograd.grad(truth.square().sum(), plain, create_graph=True)
    totals = [torch.autograd.grad(sum(g.sum() for g in grads), by) for grads, by in ((found, leaves), (right, plain))]
    for a, b in zip(*totals, strict=True):
        torch.testing.assert_close(a, b)


def test_the_first_derivative_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    if dampr.backend_info()["cpp"].startswith("missing"):
        pytest.skip("no extension")
    for name, (_, function, _) in CASES.items():
        data = {key: t.requires_grad_() for key, t in data_of(name).items()}
        nodes, y = [], function(**data)
        seen = [y.grad_fn]
        while seen:
            node = seen.pop()
            if node is not None:
                seen += [other for other, _ in node.next_functions]
                nodes += [type(node)._forward_cls] if hasattr(type(node), "_forward_cls") else []
        assert nodes or name == "open_probability", name
        for node in nodes:
            monkeypatch.setattr(node, "plain", lambda *_: pytest.fail("plain PyTorch in a first derivative"))
        torch.autograd.grad(y.sum(), list(data.values()))
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(dtype: torch.dtype, cpu_backend: str) -> None:
    name = "linear, both, per sample"
    data = data_of(name)
    narrow = {key: t.to(torch.float32 if "gate" in key else dtype) for key, t in data.items()}
    right = derivatives(CASES[name][2], {key: t.double() for key, t in narrow.items()})
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    for key, t in derivatives(CASES[name][1], narrow).items():
        torch.testing.assert_close(t.double(), right[key], **tolerance)


def test_a_loss_of_a_value_and_of_its_gradient_by_one_input(cpu_backend: str) -> None:
    found = []
    for function in CASES["linear, output"][1:]:
        data = {key: t.requires_grad_() for key, t in data_of("linear, output").items()}
        y = function(**data)
        (dx,) = torch.autograd.grad(y.square().sum(), data["x"], create_graph=True)
        (y.sum() + dx.square().sum()).backward(inputs=[data["weight"]])
        assert data["x"].grad is None
        found.append(data["weight"].grad)
    torch.testing.assert_close(*found)


def test_an_input_that_depends_on_another_counts_once(cpu_backend: str) -> None:
    """The gradient by x is a partial one, though x is made of the weight."""
    found = []
    for function in CASES["linear, output"][1:]:
        data = {key: t.requires_grad_() for key, t in data_of("linear, output").items()}
        x = (data["weight"][:3] * 2).tanh()
        y = function(**(data | {"x": x}))
        dx, dw = torch.autograd.grad(y.pow(3).sum(), (x, data["weight"]), create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum() + dw.square().sum(), list(data.values()), allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_batches_of_gradients(name: str, cpu_backend: str) -> None:
    data = {key: t.requires_grad_() for key, t in data_of(name).items()}
    y = CASES[name][1](**data)
    dys = torch.randn(3, *y.shape, dtype=torch.float64)
    leaves = list(data.values())
    found = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    again = torch.func.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(dys)
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for a, b, *right in zip(found, again, *each, strict=True):
        torch.testing.assert_close(a, torch.stack(right))
        torch.testing.assert_close(b, torch.stack(right))


@pytest.mark.parametrize("name", CASES)
def test_vectorized_jacobians(name: str, cpu_backend: str) -> None:
    shapes, *functions = CASES[name]
    data = tuple(data_of(name).values())

    def jacobian(function: Callable[..., Tensor], strategy: str) -> Any:
        def positional(*given: Tensor) -> Tensor:
            return function(**dict(zip(shapes, given, strict=True)))

        return torch.autograd.functional.jacobian(positional, data, vectorize=True, strategy=strategy)

    rows = [
        jacobian(functions[0], "reverse-mode"),
        jacobian(functions[0], "forward-mode"),
        jacobian(functions[1], "reverse-mode"),
    ]
    for reverse, forward, right in zip(*rows, strict=True):
        torch.testing.assert_close(reverse, right, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(forward, right, rtol=1e-7, atol=1e-9)


def test_with_checkpointing(cpu_backend: str) -> None:
    layer, found = GatedLinear(4, 3), []
    x = torch.randn(5, 4, requires_grad=True)
    for run in (layer, lambda t: checkpoint(layer, t, use_reentrant=False)):
        torch.manual_seed(1)
        (dx,) = torch.autograd.grad(run(x).pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()], materialize_grads=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_under_the_compiler_they_are_refused_by_name() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(GatedLinear(4, 3), backend="aot_eager", fullgraph=True)(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()
