"""Gated layers under torch.func, forward mode and second derivatives: what the dense layer times its gates gives,
for the same draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.nn import functional as F

from dampr import philox, reference
from dampr.gates import HardConcrete
from dampr.nn import (
    GatedActivation,
    GatedBatchNorm1d,
    GatedBatchNorm2d,
    GatedConv1d,
    GatedConv2d,
    GatedEmbedding,
    GatedGRU,
    GatedLayerNorm,
    GatedLinear,
    GatedLSTM,
    GatedMultiheadAttention,
    GatedResidual,
    GatedRNN,
)

SEED = 3
Parameters = dict[str, Tensor]


class Case(NamedTuple):
    """A layer, the shape of its input, and what it computes of x, its parameters and its gates z (n,), or (rows, n)."""

    build: Callable[[], Any]
    shape: tuple[int, ...]
    truth: Callable[[Any, Tensor, Parameters, Tensor], Tensor]


def vector(z: Tensor, dims: int) -> Tensor:
    """Gates (n,), or (rows, n), of the channels of x (B, C, ...) with ``dims`` dimensions."""
    return z.view(*z.shape, *[1] * (dims - 2))


def conv(layer: Any, x: Tensor, p: Parameters, z: Tensor) -> Tensor:
    function = F.conv1d if x.dim() == 3 else F.conv2d
    if layer.granularity == "input":
        return function(x * vector(z, x.dim()), p["weight"], p["bias"])
    if layer.granularity == "weight":
        return function(x, p["weight"] * z.view(p["weight"].shape), p["bias"])
    y = function(x, p["weight"], p["bias"])
    return y * vector(z, y.dim())


def batch_norm(layer: Any, x: Tensor, p: Parameters, z: Tensor) -> Tensor:
    kept = (None, None) if layer.training else (layer.running_mean, layer.running_var)
    y = F.batch_norm(x, *kept, p["weight"], p["bias"], layer.training) * vector(z, x.dim())
    return F.relu(y) if layer.activation else y


def recurrent(layer: Any, x: Tensor, p: Parameters, z: Tensor) -> Tensor:
    mode, weights = layer.mode, [[*(p[name] for name in names), None] for names in layer._all_weights]
    return reference.gated_rnn(mode, x, weights, z.view(layer.num_layers, 1, layer.hidden_size))[0]


def attention(layer: Any, x: Tensor, p: Parameters, z: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    q, k, v = F.linear(x, p["in_proj_weight"], p["in_proj_bias"]).chunk(3, dim=-1)
    return reference.gated_attention(q, k, v, z, p["out_proj.weight"], p["out_proj.bias"])[0].transpose(0, 1)


def blocks(z: Tensor, p: Parameters) -> Tensor:
    return z.view(3, 2).repeat_interleave(2, 0)[:5].repeat_interleave(2, 1)


CASES = {
    "linear": Case(lambda: GatedLinear(4, 5), (3, 4), lambda _, x, p, z: F.linear(x, p["weight"], p["bias"]) * z),
    "linear, input": Case(
        lambda: GatedLinear(4, 5, granularity="input"),
        (3, 4),
        lambda _, x, p, z: F.linear(x * z, p["weight"], p["bias"]),
    ),
    "linear, weight": Case(
        lambda: GatedLinear(4, 5, granularity="weight"),
        (3, 4),
        lambda _, x, p, z: F.linear(x, p["weight"] * z.view(5, 4), p["bias"]),
    ),
    "linear, blocks": Case(
        lambda: GatedLinear(4, 5, granularity=(2, 2)),
        (3, 4),
        lambda _, x, p, z: F.linear(x, p["weight"] * blocks(z, p), p["bias"]),
    ),
    "linear, per sample": Case(
        lambda: GatedLinear(4, 5, per_sample=True), (3, 4), lambda _, x, p, z: F.linear(x, p["weight"], p["bias"]) * z
    ),
    "conv1d": Case(lambda: GatedConv1d(2, 3, 2), (2, 2, 5), conv),
    "conv2d": Case(lambda: GatedConv2d(2, 3, 2), (2, 2, 3, 3), conv),
    "conv2d, 1 x 1": Case(lambda: GatedConv2d(2, 3, 1), (2, 2, 3, 3), conv),
    "conv2d, input": Case(lambda: GatedConv2d(2, 3, 2, granularity="input"), (2, 2, 3, 3), conv),
    "conv2d, weight": Case(lambda: GatedConv2d(2, 3, 2, granularity="weight"), (2, 2, 3, 3), conv),
    "conv2d, per sample": Case(lambda: GatedConv2d(2, 3, 2, per_sample=True), (2, 2, 3, 3), conv),
    "batch norm": Case(lambda: GatedBatchNorm1d(3), (4, 3), batch_norm),
    "batch norm of images": Case(lambda: GatedBatchNorm2d(3, activation="relu"), (2, 3, 2, 2), batch_norm),
    "batch norm, per sample": Case(lambda: GatedBatchNorm2d(3, per_sample=True), (2, 3, 2, 2), batch_norm),
    "layer norm": Case(
        lambda: GatedLayerNorm(4), (3, 4), lambda _, x, p, z: F.layer_norm(x, (4,), p["weight"], p["bias"]) * z
    ),
    "gate": Case(lambda: GatedActivation(4), (3, 4), lambda _, x, p, z: x * z),
    "gate, index": Case(
        lambda: GatedActivation(3, index=torch.tensor([2, 0, 0, 1]), per_sample=True),
        (3, 4),
        lambda _, x, p, z: x * z[..., [2, 0, 0, 1]],
    ),
    "residual": Case(
        lambda: GatedResidual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
        (3, 4),
        lambda _, x, p, z: x + z * F.linear(x, p["branch.0.weight"], p["branch.0.bias"]).tanh(),
    ),
    "attention": Case(lambda: GatedMultiheadAttention(4, 2), (3, 2, 4), attention),
    "lstm": Case(lambda: GatedLSTM(3, 4, num_layers=2), (2, 2, 3), recurrent),
    "gru": Case(lambda: GatedGRU(3, 4), (2, 2, 3), recurrent),
    "rnn": Case(lambda: GatedRNN(3, 4), (2, 2, 3), recurrent),
}
RECURRENT = ("lstm", "gru", "rnn")  # which torch itself does not vmap
PER_SAMPLE = ("linear, per sample", "conv2d, per sample", "batch norm, per sample", "gate, index")


def gates_of(layer: Any, log_alpha: Tensor, rows: int) -> Tensor:
    """The draw of a call after torch.manual_seed(SEED), or the gates of the evaluation, as in Louizos et al. 2018, eq.
    10-13.
    """
    if not layer.training:
        return (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)
    torch.manual_seed(SEED)
    n, each = log_alpha.numel(), layer.per_sample
    u = philox.uniform(philox.draw_seed(), n * (rows if each else 1)).double()
    s = torch.sigmoid((torch.logit(u.view(rows, n) if each else u) + log_alpha) * 1.5)
    return (s * 1.2 - 0.1).clamp(0, 1)


class Problem:
    """A layer in float64 with its parameters, as functions of these and of x: itself, and written out."""

    def __init__(self, name: str, training: bool) -> None:
        self.case = CASES[name]
        self.layer = self.case.build().double().train(training)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for p in self.layer.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
            own = self.layer.gate.log_alpha
            own.copy_(torch.linspace(-0.7, 1.1, own.numel()))
        self.parameters = {key: p.detach().clone() for key, p in self.layer.named_parameters()}
        self.buffers = {key: b.clone() for key, b in self.layer.named_buffers() if key != "index"}
        self.x = torch.randn(self.case.shape, generator=generator, dtype=torch.float64)

    def layers(self, p: Parameters, x: Tensor) -> Tensor:
        """With statistics of its own to move, as torch asks of a norm that is transformed."""
        torch.manual_seed(SEED)
        given = (x, x, x) if isinstance(self.layer, GatedMultiheadAttention) else (x,)
        y = functional_call(self.layer, {**p, **{key: b.clone() for key, b in self.buffers.items()}}, given)
        return y[0] if isinstance(y, tuple) else y

    def truth(self, p: Parameters, x: Tensor) -> Tensor:
        return self.case.truth(self.layer, x, p, gates_of(self.layer, p["gate.log_alpha"], x.shape[0]))


def cubed(function: Callable[..., Tensor]) -> Callable[[Parameters, Tensor], Tensor]:
    return lambda p, x: (function(p, x) + 0.5).pow(3).sum()


def same(found: Any, right: Any) -> None:
    torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)


both = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@both
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str, training: bool, cpu_backend: str) -> None:
    problem = Problem(name, training)
    x, p, v = problem.x, problem.parameters, torch.linspace(-1, 1, problem.x.numel()).double().view(problem.x.shape)
    layer, truth = cubed(problem.layers), cubed(problem.truth)
    right = torch.autograd.functional.hessian(lambda x: truth(p, x), x)
    assert right.abs().max() > 1e-3
    same(torch.autograd.functional.hessian(lambda x: layer(p, x), x), right)
    same(torch.autograd.functional.hvp(lambda x: layer(p, x), x, v)[1], torch.tensordot(right, v, x.dim()))
    same(torch.autograd.functional.vhp(lambda x: layer(p, x), x, v)[1], torch.tensordot(right, v, x.dim()))
    same(jvp(grad(lambda x: layer(p, x)), (x,), (v,))[1], torch.tensordot(right, v, x.dim()))
    same(jacrev(jacrev(lambda x: layer(p, x)))(x), right)
    if name not in RECURRENT:  # torch's own have no batches of tangents
        same(jacfwd(jacrev(lambda x: layer(p, x)), randomness="same")(x), right)
        if not training:
            same(hessian(lambda x: layer(p, x))(x), right)


@both
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_by_parameters(name: str, training: bool, cpu_backend: str) -> None:
    """A penalty on the gradient by x, and on that by every parameter, differentiated by all of them."""
    problem, found = Problem(name, training), []
    for function in (problem.layers, problem.truth):
        leaves = {
            "x": problem.x.clone().requires_grad_(),
            **{k: t.clone().requires_grad_() for k, t in problem.parameters.items()},
        }
        x, *ps = leaves.values()
        loss = cubed(function)(dict(zip(problem.parameters, ps, strict=True)), x)
        first = torch.autograd.grad(loss, [x, *ps], create_graph=True)
        total = loss + sum(g.square().sum() for g in first)
        found.append(dict(zip(leaves, torch.autograd.grad(total, [x, *ps]), strict=True)))
    assert found[1]["gate.log_alpha"].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name: str, cpu_backend: str) -> None:
    problem = Problem(name, True)
    names = list(problem.parameters)
    leaves = [problem.x.requires_grad_(), *(p.requires_grad_() for p in problem.parameters.values())]
    assert torch.autograd.gradgradcheck(
        lambda x, *p: problem.layers(dict(zip(names, p, strict=True)), x), leaves, fast_mode=True, atol=1e-5
    )


@both
@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in RECURRENT and not name.startswith("batch norm")]
)
def test_gradients_of_each_sample(name: str, training: bool, cpu_backend: str) -> None:
    problem = Problem(name, training)
    xs = torch.stack([problem.x, 2 * problem.x, problem.x - 1])
    found = vmap(grad(cubed(problem.layers)), in_dims=(None, 0), randomness="same")(problem.parameters, xs)
    each = [grad(cubed(problem.truth))(problem.parameters, x) for x in xs]
    same(found, {key: torch.stack([g[key] for g in each]) for key in found})


@pytest.mark.parametrize("name", [name for name in CASES if name not in RECURRENT])
def test_samples_may_have_draws_of_their_own(name: str, cpu_backend: str) -> None:
    layer = CASES[name].build().train()
    if hasattr(layer, "track_running_stats"):
        pytest.skip("a norm's statistics are not those of one sample")
    with torch.no_grad():
        layer.gate.log_alpha.zero_()
    x = torch.randn(CASES[name].shape).expand(8, *CASES[name].shape)
    call = (lambda x: layer(x, x, x)[0]) if isinstance(layer, GatedMultiheadAttention) else layer
    different, alike = (vmap(call, randomness=how)(x).detach().flatten(1) for how in ("different", "same"))
    assert len(alike.unique(dim=0)) == 1
    assert len(different.unique(dim=0)) > 1


@both
@pytest.mark.parametrize("name", [name for name in CASES if name not in RECURRENT])
def test_ensembles(name: str, training: bool, cpu_backend: str) -> None:
    first, second = Problem(name, training), Problem(name, training)
    with torch.no_grad():
        for p in second.layer.parameters():
            p.mul_(0.7).add_(0.1)
    parameters, buffers = stack_module_state([first.layer, second.layer])

    def call(p: Parameters, b: Parameters, x: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        given = (x, x, x) if name == "attention" else (x,)
        y = functional_call(first.layer, (p, b), given)
        return y[0] if isinstance(y, tuple) else y

    found = vmap(call, in_dims=(0, 0, None), randomness="same")(parameters, buffers, first.x)
    own = [{key: p.detach() for key, p in problem.layer.named_parameters()} for problem in (first, second)]
    same(found.detach(), torch.stack([first.truth(p, first.x) for p in own]))


@both
@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name: str, training: bool, cpu_backend: str) -> None:
    problem = Problem(name, training)
    inputs = problem.parameters, problem.x
    tangents = torch.utils._pytree.tree_map(
        lambda t: torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape), inputs
    )
    right = jvp(problem.truth, inputs, tangents)
    same(jvp(problem.layers, inputs, tangents), right)
    with forward_ad.dual_level():
        duals = torch.utils._pytree.tree_map(forward_ad.make_dual, inputs, tangents)
        found = forward_ad.unpack_dual(problem.layers(*duals))
        same((found.primal, found.tangent), right)


@both
@pytest.mark.parametrize("name", CASES)
def test_batches_of_gradients(name: str, training: bool, cpu_backend: str) -> None:
    problem = Problem(name, training)
    leaves = {key: p.requires_grad_() for key, p in problem.parameters.items()}
    y, right = problem.layers(leaves, problem.x), problem.truth(leaves, problem.x)
    dys = torch.randn(3, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, list(leaves.values()), dys, is_grads_batched=True)
    same(found, torch.autograd.grad(right, list(leaves.values()), dys, is_grads_batched=True))
    by_rows = [
        torch.autograd.functional.jacobian(lambda x, f=f: f(problem.parameters, x), problem.x, vectorize=True)
        for f in (problem.layers, problem.truth)
    ]
    same(*by_rows)


@pytest.mark.parametrize("gate", ["dam", "dep_l0", "diffprune", "diffmask"])
@both
def test_other_families(gate: str, training: bool) -> None:
    """Against loops and double backwards of the same layer."""
    layer = GatedLinear(4, 5, gate=gate).double().train(training)
    if gate == "dam":
        layer.gate.beta.data.fill_(-2.2)  # two are open
    p, x = {key: t.detach() for key, t in layer.named_parameters()}, torch.randn(3, 4, dtype=torch.float64)

    def loss(p: Parameters, x: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        return functional_call(layer, p, (x,)).pow(3).sum()

    right = torch.autograd.functional.hessian(lambda x: loss(p, x), x)
    assert right.abs().max() > 1e-3
    same(jacrev(jacrev(lambda x: loss(p, x)))(x), right)
    found = vmap(grad(loss), in_dims=(None, 0), randomness="same")(p, torch.stack([x, x + 1]))
    each = [grad(loss)(p, t) for t in (x, x + 1)]
    same(found, {key: torch.stack([g[key] for g in each]) for key in found})
    leaves = {key: t.clone().requires_grad_() for key, t in p.items()}
    eager = torch.autograd.grad(loss(leaves, x), list(leaves.values()))
    same(dict(zip(p, eager, strict=True)), each[0])


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in RECURRENT and not name.startswith("batch norm")]
)
def test_under_autocast(name: str, cpu_backend: str) -> None:
    """A penalty on a gradient and a vmap, in bfloat16, near what float32 gives."""
    layer, x = CASES[name].build().eval(), torch.randn(CASES[name].shape, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return (layer(x, x, x)[0] if isinstance(layer, GatedMultiheadAttention) else layer(x)).float()

    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
            each = vmap(call)(x.detach()[None])[0]
        found.append(
            [each.detach(), *torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()], materialize_grads=True)]
        )
    for narrow, wide in zip(*found, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0.1, atol=0.05 * float(wide.detach().abs().max()) + 1e-3)


def test_a_shared_gate_is_itself_again_after_a_functional_call() -> None:
    """With tie_weights=False: else torch gives no module that others share its own parameters back."""
    gate = HardConcrete(4)
    model = nn.Sequential(GatedLinear(4, 4, gate=gate), nn.Tanh(), GatedLinear(4, 4, gate=gate)).eval()
    own, x = gate.log_alpha, torch.randn(3, 4)
    given = {key: p.detach() - 4 * (p is own) for key, p in model.named_parameters()}
    y = functional_call(model, given, (x,), tie_weights=False)
    assert gate.log_alpha is own
    with torch.no_grad():
        own.sub_(4)
    torch.testing.assert_close(y, model(x))


def test_a_closed_branch_under_a_transform() -> None:
    layer = GatedResidual(nn.Linear(3, 3)).eval()
    layer.gate.log_alpha.data.fill_(-9.0)
    x = torch.randn(2, 3)
    assert torch.equal(vmap(layer)(x), x)
    assert torch.equal(grad(lambda x: layer(x).sum())(x), torch.ones(2, 3))


class Net(nn.Module):
    """Two gated layers and a tanh, and the same written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = GatedLinear(3, 6), GatedLinear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Dense(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer, last in ((self.first, False), (self.last, True)):
            u = philox.uniform(philox.draw_seed(), layer.out_features).double()
            z = (torch.sigmoid((torch.logit(u) + layer.gate.log_alpha) * 1.5) * 1.2 - 0.1).clamp(0, 1)
            x = F.linear(x, layer.weight, layer.bias) * z
            x = x if last else x.tanh()
        return x


def seeded(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(11)
    return net(x)


def r1(net: nn.Module, x: Tensor) -> Tensor:
    """Mescheder et al. 2018."""
    (dx,) = torch.autograd.grad(seeded(net, x).sum(), x, create_graph=True)
    return dx.square().sum(1).mean()


def wgan_gp(net: nn.Module, x: Tensor) -> Tensor:
    """Gulrajani et al. 2017: the critic's values and the norm of its gradient between two batches."""
    between = (0.3 * x + 0.7 * x.flip(0)).detach().requires_grad_()
    (dx,) = torch.autograd.grad(seeded(net, between).sum(), between, create_graph=True)
    return seeded(net, x).mean() - seeded(net, x.flip(1)).mean() + 10 * (dx.norm(dim=1) - 1).square().mean()


def forces(net: nn.Module, x: Tensor) -> Tensor:
    """An energy and its negative gradient, both matched."""
    energy = seeded(net, x)
    (force,) = torch.autograd.grad(-energy.sum(), x, create_graph=True)
    return (energy - 1).square().mean() + (force - x.detach().sin()).square().mean()


def maml(net: nn.Module, x: Tensor) -> Tensor:
    """Finn et al. 2017: the loss after a step of gradient descent, by the parameters before it."""
    before = dict(net.named_parameters())
    loss = (seeded(net, x) - 1).square().mean()
    steps = torch.autograd.grad(loss, list(before.values()), create_graph=True)
    after = {key: p - 0.2 * step for (key, p), step in zip(before.items(), steps, strict=True)}
    torch.manual_seed(11)
    return (functional_call(net, after, (x + 0.5,)) - 1).square().mean()


@pytest.mark.parametrize("loss", [r1, wgan_gp, forces, maml], ids=lambda f: f.__name__)
def test_losses_of_gradients(loss: Callable[[nn.Module, Tensor], Tensor], cpu_backend: str) -> None:
    net, dense = Net().double(), Dense().double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-0.8, 1, p.numel()).view(p.shape) if p.numel() > 1 else torch.full_like(p, 0.4))
    dense.load_state_dict(net.state_dict())
    found = []
    for model in (net, dense):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        loss(model, x).backward(inputs=list(model.parameters()))
        found.append({key: p.grad for key, p in model.named_parameters()})
    assert all(g is not None for g in found[0].values()) or loss is r1
    assert found[1]["last.gate.log_alpha"].abs().max() > 1e-4
    same(*({key: g for key, g in grads.items() if g is not None} for grads in found))


# dynamo's own, of every autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["linear", "conv2d", "layer norm"])
def test_transforms_compile(name: str) -> None:
    problem = Problem(name, False)

    def each(x: Tensor) -> Tensor:
        return vmap(grad(lambda x: functional_call(problem.layer, problem.parameters, (x,)).pow(3).sum()))(x)

    xs = torch.stack([problem.x, problem.x + 1])
    torch._dynamo.reset()
    same(torch.compile(each, backend="aot_eager", fullgraph=True)(xs), each(xs))


def test_a_table_of_embeddings(cpu_backend: str) -> None:
    words, found = torch.tensor([[0, 3], [2, 0]]), []
    layer = GatedEmbedding(5, 4).double()
    layer.gate.log_alpha.data.copy_(torch.linspace(-0.7, 1.1, 4))
    for written_out in (False, True):
        leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        table, log_alpha = leaves

        def call(table: Tensor, log_alpha: Tensor, written_out: bool = written_out) -> Tensor:
            if written_out:
                return F.embedding(words, table) * gates_of(layer, log_alpha, 2)
            torch.manual_seed(SEED)
            return functional_call(layer, {"weight": table, "gate.log_alpha": log_alpha}, (words,))

        first = torch.autograd.grad(call(*leaves).pow(3).sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
        found[-1].append(jvp(call, (table.detach(), log_alpha.detach()), (table.detach(), log_alpha.detach()))[1])
    for a, b in zip(*found, strict=True):
        same(a, b)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_layers_do_as_torchs_where_torch_has_no_rule(kind: str) -> None:
    dense = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[kind](3, 4)
    gated = CASES[kind].build()
    for layer in (dense, gated):
        p = {key: torch.stack([t.detach(), t.detach()]) for key, t in layer.named_parameters()}
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            vmap(lambda p, layer=layer: functional_call(layer, p, (torch.ones(2, 2, 3),))[0], randomness="same")(p)
