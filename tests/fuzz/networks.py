"""Target: random networks. Some of their units go; the rest computes the same, and costs what was foretold.

A network is a row of steps over (batch, length, features) or (batch, channels, height, width), each with layers of its
own and a function that runs them, as code in a forward does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dampr
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from dampr.prune.modules import gates_of

from .values import Draw

Layers = dict[str, nn.Module | nn.Parameter]
Run = Callable[[Any, Tensor], Tensor]  # the step, what it reads
Built = tuple[Layers, Run, int]  # and how wide it is behind it
ACTIVATIONS = (F.relu, F.gelu, torch.tanh, F.silu, torch.sigmoid, F.softplus, lambda y: y)


FAMILIES = ("hard_concrete", "hard_concrete", "dep_l0", "diffprune", "diffmask")  # whose gates close in any order


class Step(nn.Module):
    """Layers, and what runs them."""

    def __init__(self, name: str, layers: Layers, run: Run) -> None:
        super().__init__()
        self.name, self.run = name, run
        for own, layer in layers.items():
            setattr(self, own, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def linear(draw: Draw, width: int) -> Built:
    out, act = draw.choice((6, 8, 12, 16)), draw.choice(ACTIVATIONS)
    return {"a": nn.Linear(width, out, bias=draw.chance(0.7))}, lambda m, x: act(m.a(x)), out


def over_time(draw: Draw, width: int) -> Built:
    out, groups, kernel = draw.choice((6, 8, 12)), draw.choice((1, 1, 2)) if width % 2 == 0 else 1, draw.choice((1, 3))
    how = {"padding": kernel // 2, "groups": groups, "padding_mode": draw.choice(("zeros", "circular"))}
    norm = nn.BatchNorm1d(out) if draw.chance(0.6) else nn.Identity()
    act = draw.choice(ACTIVATIONS)
    layers: Layers = {"a": nn.Conv1d(width, out, kernel, bias=draw.chance(0.7), **how), "n": norm}
    return layers, lambda m, x: act(m.n(m.a(x.transpose(1, 2)))).transpose(1, 2), out


def depthwise(draw: Draw, width: int) -> Built:
    layer = nn.Conv1d(width, width, 3, padding=1, groups=width)
    return {"a": layer}, lambda m, x: m.a(x.transpose(1, 2)).transpose(1, 2), width


class OwnLinear(nn.Linear):
    """Layers of classes of their own, as users derive them."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


class OwnGRU(nn.GRU):
    pass


class OwnLSTM(nn.LSTM):
    def forward(self, x: Any, state: Any = None) -> Any:
        y, state = super().forward(x, state)
        return 0.5 * y, state


def derived(draw: Draw, width: int) -> Built:
    out, act = draw.choice((6, 8, 12)), draw.choice(ACTIVATIONS)
    return {"a": OwnLinear(width, out)}, lambda m, x: act(m.a(x)), out


def recurrent(draw: Draw, width: int) -> Built:
    hidden, both = draw.choice((6, 8)), draw.chance(0.4)
    kind = draw.choice((nn.LSTM, nn.GRU, nn.RNN, OwnGRU, OwnLSTM))
    projected = {"proj_size": 4} if issubclass(kind, nn.LSTM) and draw.chance(0.2) else {}
    layer = kind(width, hidden, draw.choice((1, 2)), batch_first=True, bidirectional=both, **projected)
    return {"a": layer}, lambda m, x: m.a(x)[0], projected.get("proj_size", hidden) * (1 + both)


def attended(draw: Draw, width: int) -> Built:
    """Attention without weights over what a recurrent layer returns."""
    layers, run, out = recurrent(draw, width)

    def attend(m: Any, x: Tensor) -> Tensor:
        y = run(m, x)
        return (y @ y.transpose(1, 2)).softmax(-1) @ y

    return layers, attend, out


def listed(draw: Draw, width: int) -> Built:
    """Weights in a list or a dict of parameters."""
    weights = [nn.Parameter(torch.randn(shape) / 3) for shape in ((8, width), (10, 8))]
    if draw.chance(0.5):
        return {"w": nn.ParameterList(weights)}, lambda m, x: F.linear(F.relu(F.linear(x, m.w[0])), m.w[1]), 10
    named = nn.ParameterDict({"first": weights[0], "second": weights[1]})
    return {"w": named}, lambda m, x: F.linear(torch.tanh(F.linear(x, m.w["first"])), m.w["second"]), 10


def norm(draw: Draw, width: int) -> Built:
    return {"a": draw.choice((nn.LayerNorm, nn.RMSNorm))(width)}, lambda m, x: m.a(x), width


def attention(draw: Draw, width: int) -> Built:
    heads, size, way = draw.choice((1, 2, 3)), draw.choice((2, 4)), draw.choice(("fused", "split", "three"))
    inner, plain = heads * size, draw.chance(0.5)
    layers: Layers = {"o": nn.Linear(inner, width)}
    layers |= {n: nn.Linear(width, inner) for n in "qkv"} if way == "three" else {"a": nn.Linear(width, 3 * inner)}

    def run(m: Any, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if way == "fused":
            q, k, v = m.a(x).view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = m.a(x).chunk(3, -1) if way == "split" else (m.q(x), m.k(x), m.v(x))
            q, k, v = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in parts)
        y = (q @ k.transpose(-1, -2) / size**0.5).softmax(-1) @ v if plain else F.scaled_dot_product_attention(q, k, v)
        return x + m.o(y.transpose(1, 2).reshape(batch, length, inner))

    return layers, run, width


def torch_attention(draw: Draw, width: int) -> Built:
    heads = draw.choice([h for h in (1, 2, 3, 4) if width % h == 0])
    layer = nn.MultiheadAttention(width, heads, batch_first=True)
    return {"a": layer}, lambda m, x: x + m.a(x, x, x, need_weights=False)[0], width


def residual(draw: Draw, width: int) -> Built:
    inner, kind = draw.choice((6, 10)), draw.choice(("plain", "normed", "scaled", "gating"))
    layers: Layers = {"a": nn.Linear(width, inner), "b": nn.Linear(inner, width), "n": nn.LayerNorm(width)}
    layers["g"] = nn.Parameter(torch.rand(width))

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.b(F.relu(m.a(m.n(x) if kind == "normed" else x)))
        return x * y.sigmoid() if kind == "gating" else x + (y * m.g if kind == "scaled" else y)

    return layers, run, width


def joined(draw: Draw, width: int) -> Built:
    first, second, keep, turned = draw.choice((4, 6)), draw.choice((4, 8)), draw.chance(0.3), draw.chance(0.3)
    layers: Layers = {"a": nn.Linear(width, first), "b": nn.Linear(width, second)}

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([F.relu(m.a(x)), torch.tanh(m.b(x)), *([x] if keep else [])], -1)
        return y.flip(-1) if turned else y

    return layers, run, first + second + (width if keep else 0)


def halves(draw: Draw, width: int) -> Built:
    out = draw.choice((6, 8))
    way: Callable[[Tensor], Tensor] = draw.choice(
        (
            lambda y: F.glu(y, -1),
            lambda y: y.chunk(2, -1)[0] * F.silu(y.chunk(2, -1)[1]),
            lambda y: y[..., :out] * y[..., out:].tanh(),
            lambda y: torch.add(*y.split(out, -1)),
        )
    )
    return {"a": nn.Linear(width, 2 * out)}, lambda m, x: way(m.a(x)), out


def excited(draw: Draw, width: int) -> Built:
    layers: Layers = {"a": nn.Linear(width, 5), "b": nn.Linear(5, width)}
    return layers, lambda m, x: x * m.b(F.relu(m.a(x.mean(1)))).sigmoid().unsqueeze(1), width


def twice(draw: Draw, width: int) -> Built:
    if draw.chance(0.5):
        return {"a": nn.Linear(width, width)}, lambda m, x: m.a(F.relu(m.a(x))), width
    layer = nn.Linear(width, 7)
    return {"a": layer}, lambda m, x: torch.cat([m.a(x).relu(), m.a(x.flip(1)).relu()], -1), 14


def bare(draw: Draw, width: int) -> Built:
    way: Callable[[Tensor, Tensor], Tensor] = draw.choice(
        (
            lambda x, w: x @ w,
            lambda x, w: torch.einsum("btc,cd->btd", x, w),
            lambda x, w: torch.tensordot(x, w, 1),
            lambda x, w: F.linear(x, w.t()),
        )
    )
    layers: Layers = {"w": nn.Parameter(torch.randn(width, 8) / 3), "b": nn.Parameter(torch.randn(8) / 3)}
    return layers, lambda m, x: F.relu(way(x, m.w) + m.b), 8


def computed(draw: Draw, width: int) -> Built:
    """Weights that are computed from others."""
    kind = draw.choice((nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm))
    return {"a": kind(nn.Linear(width, 8)), "b": nn.Linear(8, 10)}, lambda m, x: m.b(F.relu(m.a(x))), 10


def encoded(draw: Draw, width: int) -> Built:
    heads, first = draw.choice([h for h in (1, 2, 3) if width % h == 0]), draw.chance(0.5)
    layer = nn.TransformerEncoderLayer(width, heads, 10, 0.0, batch_first=True, norm_first=first)
    return {"a": layer}, lambda m, x: m.a(x), width


def stepped(draw: Draw, width: int) -> Built:
    """A cell, step by step."""
    hidden = draw.choice((6, 8))

    def run(m: Any, x: Tensor) -> Tensor:
        states = [x.new_zeros(len(x), hidden)]
        for step in x.unbind(1):
            states.append(m.a(step, states[-1]))
        return torch.stack(states[1:], 1)

    return {"a": draw.choice((nn.GRUCell, nn.RNNCell))(width, hidden)}, run, hidden


def crossed(draw: Draw, width: int) -> Built:
    """Queries that are parameters read keys and values that have a width of their own."""
    layers: Layers = {"a": nn.Linear(width, 10), "q": nn.Parameter(torch.randn(3, 8) / 3)}
    layers["m"] = nn.MultiheadAttention(8, 2, kdim=10, vdim=10, batch_first=True)

    def run(m: Any, x: Tensor) -> Tensor:
        read = F.relu(m.a(x))
        found: Tensor = m.m(m.q.expand(len(x), -1, -1), read, read, need_weights=False)[0]
        return found

    return layers, run, 8


def repeated(draw: Draw, width: int) -> Built:
    """Run again in the backward."""
    layers: Layers = {"a": nn.Linear(width, 8), "b": nn.Linear(8, width)}

    def inner(m: Any, x: Tensor) -> Tensor:
        return x + m.b(torch.tanh(m.a(x)))

    return layers, lambda m, x: checkpoint(inner, m, x, use_reentrant=False), width


def hooked(draw: Draw, width: int) -> Built:
    """A layer with hooks that change what it reads or what it writes."""
    out, layer = draw.choice((6, 8, 12)), nn.Linear(width, draw.choice((8, 10)))
    change: Callable[[Tensor], Tensor] = draw.choice(
        (lambda y: 1.5 * y, lambda y: y + 0.3, F.relu, lambda y: y - y.mean(-1, keepdim=True))
    )
    if draw.chance(0.5):
        layer.register_forward_hook(lambda _, args, y: change(y))
    else:
        layer.register_forward_pre_hook(lambda _, args: (change(args[0]),))
    layers: Layers = {"a": layer, "b": nn.Linear(layer.out_features, out)}
    return layers, lambda m, x: m.b(torch.tanh(m.a(x))), out


def given_a_forward(draw: Draw, width: int) -> Built:
    """A layer whose forward is set on the object, with an attribute that code reads."""
    out, layer = draw.choice((6, 8, 12)), nn.Linear(width, 8)
    old, unused = layer.forward, draw.chance(0.3)
    if not unused:
        layer.forward = lambda x: 1.5 * old(x) + 0.2  # type: ignore[method-assign, assignment]
    layer.gain = 2.0  # type: ignore[assignment]
    layers: Layers = {"a": layer, "b": nn.Linear(8, out)}
    return layers, lambda m, x: m.b(F.relu(m.a(x) * m.a.gain)), out


def messages(draw: Draw, width: int) -> Built:
    """Rows that are added up where an index says."""
    out, reduce = draw.choice((6, 8)), draw.choice(("sum", "amax"))

    def run(m: Any, x: Tensor) -> Tensor:
        y = F.relu(m.a(x))
        index = (torch.arange(x.shape[1]) * 2 % x.shape[1])[None, :, None].expand_as(y)
        if reduce == "sum":
            return torch.zeros_like(y).scatter_add(1, index, y)
        return torch.zeros_like(y).scatter_reduce(1, index, y, "amax")

    return {"a": nn.Linear(width, out)}, run, out


def transformed(draw: Draw, width: int) -> Built:
    """Low frequencies are mixed and written into zeros."""
    out = draw.choice((6, 8))

    def run(m: Any, x: Tensor) -> Tensor:
        f = torch.fft.rfft(x, dim=1)
        y = f.new_zeros(len(x), f.shape[1], m.w.shape[1])
        y[:, :2] = torch.einsum("bkc,cdk->bkd", f[:, :2], m.w.to(f.dtype))
        return torch.fft.irfft(y, n=x.shape[1], dim=1)

    return {"w": nn.Parameter(torch.randn(width, out, 2, dtype=torch.cfloat) / 3)}, run, out


def written(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, 0] = y[:, 1]
    return y


OF_SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda y: y.cumsum(1) / 4,
    "roll": lambda y: y.roll(1, 1),
    "softmax": lambda y: y.softmax(1) * y,
    "sort": lambda y: y.sort(1)[0],
    "less the largest": lambda y: y - y.amax(1, keepdim=True),
    "over its deviation": lambda y: y / (y.std(1, keepdim=True) + 1),
    "masked": lambda y: y.masked_fill(y < -0.5, 0.0),
    "padded": lambda y: F.pad(y, (0, 0, 1, 0))[:, :-1],
    "stacked": lambda y: torch.stack([y, 2 * y], 0).sum(0),
    "pairs": lambda y: (y.unsqueeze(1) * y.unsqueeze(2).sigmoid()).mean(1),
    "scores": lambda y: (y @ y.transpose(1, 2) / 9).softmax(-1) @ y,
    "in place": lambda y: y.clone().mul_(2).relu_(),
    "turned in place": lambda y: y.clone().transpose_(1, 2).transpose(1, 2),
    "written": written,
    "turned": lambda y: y.permute(2, 0, 1).permute(1, 2, 0),
    "flat": lambda y: y.flatten(0, 1).unflatten(0, y.shape[:2]),
    "pooled": lambda y: F.avg_pool1d(y.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "repeated": lambda y: y.repeat(1, 2, 1)[:, : y.shape[1]],
    "halves changed": lambda y: torch.cat([y[..., y.shape[-1] // 2 :], y[..., : y.shape[-1] // 2]], -1),
    "even and odd": lambda y: torch.cat([y[..., ::2], y[..., 1::2]], -1),
    "times its mean": lambda y: y * y.mean(-1, keepdim=True).sigmoid(),
    "of length 1": lambda y: F.normalize(y, dim=-1),
    "with its reverse": lambda y: y + y.flip(-1),
    "log sigmoid": F.logsigmoid,
    "less its sum": lambda y: y - y.sum(-1, keepdim=True) / 9,
    "with the first": lambda y: y + y[:1],
    "gathered": lambda y: y.gather(1, torch.ones(y.shape, dtype=torch.int64)),
    "the two largest": lambda y: y.topk(2, 1)[0].sum(1, keepdim=True).expand_as(y),
    "shuffled": lambda y: y.reshape(*y.shape[:2], -1, 2).transpose(2, 3).reshape(y.shape) if not y.shape[-1] % 2 else y,
    "on a diagonal": lambda y: torch.diag_embed(y).sum(-1),
    "outer products": lambda y: torch.einsum("btc,btd->btd", y, y) / 9,
}


def changed(draw: Draw, width: int) -> Built:
    change = OF_SEQUENCES[draw.choice(sorted(OF_SEQUENCES))]
    return {}, lambda m, x: change(x), width


def convolved(draw: Draw, width: int) -> Built:
    kernel, act = draw.choice((1, 3, 3)), draw.choice(ACTIVATIONS)
    out, groups = draw.choice((6, 8, 12)), draw.choice((1, 1, 2)) if width % 2 == 0 else 1
    norms: tuple[Callable[[int], nn.Module], ...] = (
        nn.BatchNorm2d,
        nn.BatchNorm2d,
        nn.InstanceNorm2d,
        lambda n: nn.GroupNorm(2, n),
        lambda n: nn.Identity(),
    )
    layers: Layers = {"a": nn.Conv2d(width, out, kernel, padding=kernel // 2, groups=groups, bias=draw.chance(0.5))}
    layers["n"] = draw.choice(norms)(out)
    return layers, lambda m, x: act(m.n(m.a(x))), out


def block(draw: Draw, width: int) -> Built:
    inner, expanded = draw.choice((6, 8)), draw.chance(0.4)
    layers: Layers = {"a": nn.Conv2d(width, inner, 1, bias=False), "n": nn.BatchNorm2d(inner)}
    layers["b"] = nn.Conv2d(inner, inner, 3, padding=1, groups=inner if expanded else 1)
    layers |= {"k": nn.BatchNorm2d(inner), "c": nn.Conv2d(inner, width, 1)}
    return layers, lambda m, x: x + m.c(F.relu(m.k(m.b(F.relu(m.n(m.a(x))))))), width


def dense_block(draw: Draw, width: int) -> Built:
    layers: Layers = {"n": nn.BatchNorm2d(width), "a": nn.Conv2d(width, 6, 3, padding=1)}
    return layers, lambda m, x: torch.cat([x, m.a(F.relu(m.n(x)))], 1), width + 6


def squeezed(draw: Draw, width: int) -> Built:
    layers: Layers = {"a": nn.Conv2d(width, 4, 1), "b": nn.Conv2d(4, width, 1)}
    return layers, lambda m, x: x * m.b(F.relu(m.a(x.mean((2, 3), keepdim=True)))).sigmoid(), width


def up(draw: Draw, width: int) -> Built:
    out = draw.choice((6, 8))
    if draw.chance(0.5):
        return {"a": nn.ConvTranspose2d(width, out, 2, 2)}, lambda m, x: F.avg_pool2d(m.a(x), 2), out
    return {"a": nn.Conv2d(width, 4 * out, 1)}, lambda m, x: F.avg_pool2d(F.pixel_shuffle(m.a(x), 2), 2), out


OF_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled": lambda y: F.max_pool2d(y, 3, 1, 1),
    "resized": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")[..., ::2, ::2],
    "unpooled": lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
    "reflected": lambda y: F.pad(y, (1, 1, 1, 1), "reflect")[..., 1:-1, 1:-1],
    "edges": lambda y: F.conv2d(y.flatten(0, 1).unsqueeze(1), y.new_ones(1, 1, 3, 3), padding=1).view_as(y),
    "shuffled": lambda y: (
        y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if not y.shape[1] % 2 else y  # as in ShuffleNet
    ),
    "parts changed": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "attended": lambda y: y * torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1).mean(1, True).sigmoid(),
    "standing out": lambda y: y * (y - y.mean((2, 3), keepdim=True)).square().sigmoid(),
    "turned": lambda y: y.rot90(1, (2, 3)),
    "channels last": lambda y: y.contiguous(memory_format=torch.channels_last),
}


def changed_image(draw: Draw, width: int) -> Built:
    change = OF_IMAGES[draw.choice(sorted(OF_IMAGES))]
    return {}, lambda m, x: change(x), width


SEQUENCE = (linear, linear, linear, over_time, over_time, depthwise, recurrent, norm, attention, torch_attention)
SEQUENCE += (hooked, given_a_forward, messages, transformed)
SEQUENCE += (derived, attended, listed, computed, encoded, stepped, crossed, repeated)
SEQUENCE += (residual, residual, joined, halves, excited, twice, bare, changed, changed, changed, changed)
IMAGE = (convolved, convolved, convolved, convolved, block, block, dense_block, squeezed, up, changed_image)
IMAGE += (changed_image, changed_image)


class Network(nn.Module):
    """A row of steps, and a linear layer."""

    def __init__(self, draw: Draw, image: bool) -> None:
        super().__init__()
        steps, width = [], 6
        kinds = [draw.choice(IMAGE if image else SEQUENCE) for _ in range(draw.randint(2, 5))]
        for kind in [*(() if {convolved, linear} & set(kinds) else (convolved if image else linear,)), *kinds]:
            layers, run, out = kind(draw, width)
            steps.append(Step(kind.__name__, layers, run))
            width = out
        self.steps, self.head = nn.Sequential(*steps), nn.Linear(width, 3)
        self.image, self.end = image, draw.choice(("mean", "all", "last"))
        self.of_gradients = draw.chance(0.1)

    def forward(self, x: Tensor) -> Any:
        if not self.of_gradients:
            return self.outputs(x)
        with torch.enable_grad():  # as models do that compute forces
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.outputs(x).sum(), x, create_graph=True)[0]

    def outputs(self, x: Tensor) -> Any:
        y = self.steps(x)
        if self.image:
            return self.head(y.mean((2, 3)))
        return (
            self.head(y.mean(1)) if self.end == "mean" else self.head(y)[:, -1] if self.end == "last" else self.head(y)
        )


def trained(model: nn.Module, generator: torch.Generator) -> None:
    """Other values in place of what is one number, or a fresh statistic, everywhere."""
    gates = {id(p) for gate in gates_of(model) for p in gate.parameters()}
    for p in model.parameters():
        if id(p) not in gates and bool((p == p.flatten()[0]).all()):
            p.data = 0.3 + 0.4 * torch.rand(p.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean += 0.2 * torch.randn(module.running_mean.shape, generator=generator)
            module.running_var *= 0.5 + torch.rand(module.running_var.shape, generator=generator)


def networks(draw: Draw) -> str | None:
    """What is wrong with a random network of which some gates close; None where nothing is."""
    torch.manual_seed(draw.randrange(2**31))
    image = draw.chance(0.4)
    model, x = Network(draw, image), torch.randn(2, 6, 6, 6) if image else torch.randn(2, 4, 6)
    said = " > ".join(step.name for step in model.steps)
    before = inputs.evaluate(model, x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", dampr.prune.SightWarning)
            dampr.convert(model, x, gate=draw.choice(FAMILIES), residual=draw.chance(0.2))
    except dampr.ConversionError:  # of which every layer has a reason
        return None
    if inputs.differ(before, inputs.evaluate(model, x), 1e-5, 1e-5 * inputs.size(before)):
        return f"{said}: convert changed the outputs"
    trained(model, draw.torch)
    for share in (0.0, 0.5, draw.random()):
        complaint = cut(inputs.copied(model).double(), x.double(), share, draw.torch)
        if complaint:
            return f"{said}: {complaint}, with {share:.0%} of the gates closed"
    return None


def cut(model: nn.Module, x: Tensor, share: float, generator: torch.Generator) -> str | None:
    costs = {metric: Cost(model, x, metric) for metric in ("macs", "params")}
    structure = costs["macs"].structure
    for gate in structure.gates:
        least = torch.arange(gate.num_gates) == 0
        opened = (torch.rand(gate.num_gates, generator=generator) >= share) | least
        fully = torch.rand((), generator=generator) < 0.5  # or each between half and fully open
        levels = gate.levels() if fully else gate.levels() * torch.rand(gate.num_gates, generator=generator)
        gate.set_levels_(torch.where(opened, levels, -3.0))
    foretold = {metric: int(cost(cost.decision())) for metric, cost in costs.items()}
    masked, small = inputs.evaluate(model, 2 * x), dampr.compact(model, x)
    if inputs.differ(masked, inputs.evaluate(small, 2 * x), 1e-9, 1e-9 * inputs.size(masked)):
        return "the compacted model computes something else"
    found = {"macs": count_macs(small, x), "params": count_params(small)}
    return None if found == foretold else f"foretold {foretold}, found {found}"


TARGETS = {"networks": networks}
