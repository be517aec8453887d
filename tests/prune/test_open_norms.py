"""Residual widths of any network: norms of any type count the units whose gates are open, and the others can be cut."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dampr
from dampr.gates import Fixed, HardConcrete
from dampr.nn import GatedParameter, OpenStatistics
from dampr.nn.open_statistics import put_on, take_off
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs, count_params
from tests import models
from tests.prune.test_streams_refused import Odd
from tests.residual import Block, Classifier, E, words

FAMILIES = ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"]


class OwnRMSNorm(nn.Module):
    """As in Llama: no norm of torch.nn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.scale * (hidden_states * torch.rsqrt(variance + 1e-6))


class OwnLayerNorm(nn.Module):
    """As in ConvNeXt, channels first or last, with its size written down in a tuple."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))
        self.normalized_shape, self.first = (width,), first

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 1e-6)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias[:, None, None]


class Bare(nn.Module):
    """Without parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape)


class Blocks(nn.Module):
    """Words, two blocks with a norm before each branch, a norm, a head."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 12) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(20, width), norm(width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(self.norm(x).mean(1))


class Images(nn.Module):
    """A convolution, two blocks with depthwise convolutions and norms over channels, a norm, a head."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.Linear(8, 3)
        self.mix = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))
        self.norms = nn.ModuleList(norm(8) for _ in range(2))
        self.up = nn.ModuleList(nn.Conv2d(8, 16, 1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for mix, norm, up, down in zip(self.mix, self.norms, self.up, self.down, strict=True):
            x = x + down(F.relu(up(norm(mix(x)))))
        return self.head(self.norm(x).mean((2, 3)))


class Gating(nn.Module):
    """As in gMLP: a norm over half of what a layer writes, and nothing else that could be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.spatial, self.head = (
            nn.Linear(6, 16),
            nn.LayerNorm(8),
            nn.Linear(5, 5),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.up(x).chunk(2, -1)
        v = self.spatial(self.norm(v).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(u) * v)


images = models.ALL["vit"]()[1]
pictures = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "own RMSNorm": (lambda: Blocks(OwnRMSNorm), words),
    "RMSNorm": (lambda: Blocks(nn.RMSNorm), words),
    "LayerNorm without gain": (lambda: Blocks(Bare), words),
    # which gated layers are not
    "a block used twice": (lambda: Classifier(nn.Sequential(*[Block()] * 2), nn.LayerNorm(E)), words),
    "own LayerNorm": (lambda: Blocks(lambda n: OwnLayerNorm(n, False)), words),
    "own LayerNorm of channels": (lambda: Images(lambda n: OwnLayerNorm(n, True)), pictures),
    "GroupNorm of one group": (lambda: Images(lambda n: nn.GroupNorm(1, n)), pictures),
    "vit": (lambda: models.ALL["vit"]()[0], images),  # whose LayerNorms would do, but for its heads
    **{
        what: (lambda what=what: Odd(what), words)
        for what in ("buffer", "read before", "both", "flattened", "shuffled", "shared", "groups", "rms")
    },
}


def built(network: str, gate: str = "hard_concrete") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    build, x = NETWORKS[network]
    return dampr.convert(build().eval(), example_inputs=x, residual=True, gate=gate), x


def counting(model: nn.Module) -> dict[str, OpenStatistics]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OpenStatistics)}


def close_half(model: nn.Module, x: Any) -> Cost:
    """Every second gate of each vector (of DAM the last half)."""
    cost = Cost(model, x, "macs")
    for gate in cost.structure.gates:
        at = torch.arange(gate.num_gates)
        shut = at >= gate.num_gates // 2 if type(gate).__name__ == "Discriminative" else at % 2 == 1
        gate.set_levels_(torch.where(shut, -3.0, gate.levels()))
    return cost


@pytest.mark.parametrize("network", NETWORKS)
def test_the_stream_is_cut_in_half_exactly_as_foretold(network: str) -> None:
    torch.manual_seed(0)
    build, x = NETWORKS[network]
    model = build().eval()
    before = inputs.evaluate(model, x)
    dampr.convert(model, example_inputs=x, residual=True)
    assert counting(model)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.evaluate(model, x), strict=True))
    cost, params = close_half(model, x), Cost(model, x, "params")
    x = x.double() if x.is_floating_point() else x
    small = dampr.compact(model.double(), example_inputs=x)
    assert not counting(small)
    assert count_macs(small, x) == int(cost(cost.decision()))
    assert count_params(small) == int(params(params.decision()))
    assert count_macs(small, x) < 0.6 * cost.total
    for scale in (1.0, 30.0):
        given = x * scale if x.is_floating_point() else x
        a, b = inputs.evaluate(model, given), inputs.evaluate(small, given)
        assert inputs.gap(a, b) < 1e-12 * inputs.size(a)
    with pytest.raises(ValueError, match="counts were cut, and a wider one would count those that come back"):
        dampr.expand(small)


@pytest.mark.parametrize("gate", FAMILIES)
@pytest.mark.parametrize("network", ["own RMSNorm", "own LayerNorm of channels"])
def test_every_family(network: str, gate: str) -> None:
    model, x = built(network, gate)
    torch.testing.assert_close(inputs.evaluate(model, x), inputs.evaluate(built(network)[0], x), rtol=1e-4, atol=1e-5)
    close_half(model, x)
    small = dampr.compact(model, example_inputs=x)
    torch.testing.assert_close(inputs.evaluate(model, x), inputs.evaluate(small, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_statistics_are_those_of_the_open_elements(centred: bool) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(6, eps=0.1) if centred else nn.RMSNorm(6, eps=0.1)
    for p in norm.parameters():
        p.data.normal_()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([0, 2, 3])
    norm.double()
    narrow = type(norm)(3, eps=0.1).double()
    narrow.load_state_dict({name: p[kept] for name, p in norm.state_dict().items()})
    plain = norm(x)
    values = torch.zeros(6).index_fill(0, kept, 1.0)
    put_on(norm, OpenStatistics(Fixed(values), torch.arange(6), centred=centred))
    y, expected = norm(x)[:, kept], narrow(x[:, kept])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(dx, wanted, rtol=1e-10, atol=1e-12)
    assert torch.equal(dx[:, [1, 4, 5]], torch.zeros(4, 3, dtype=torch.float64))
    take_off(norm)
    assert torch.equal(norm(x), plain)
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks


def test_a_norm_of_a_whole_sample() -> None:
    torch.manual_seed(0)
    x, kept = torch.randn(2, 6, 3, 3, dtype=torch.float64), torch.tensor([1, 2, 5])
    norm, narrow = nn.GroupNorm(1, 6).double(), nn.GroupNorm(1, 3).double()
    put_on(
        norm,
        OpenStatistics(Fixed(torch.zeros(6).index_fill(0, kept, 1.0)), torch.arange(6), 1, centred=True, whole=True),
    )
    torch.testing.assert_close(norm(x)[:, kept], narrow(x[:, kept]), rtol=1e-12, atol=1e-12)


def test_copies_have_gates_of_their_own_and_pickle_keeps_them() -> None:
    model, x = built("own RMSNorm")
    close_half(model, x)
    expected = inputs.evaluate(model, x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert torch.equal(inputs.evaluate(other, x)[0], expected[0])
        for gates in counting(other).values():
            gates.gate.set_levels_(torch.full((gates.gate.num_gates,), 3.0))
        assert not torch.equal(inputs.evaluate(other, x)[0], expected[0])
        assert torch.equal(inputs.evaluate(model, x)[0], expected[0])


def test_the_width_is_saved_and_loaded(tmp_path: Path) -> None:
    for network in ("own LayerNorm", "LayerNorm without gain"):
        model, x = built(network)
        close_half(model, x)
        small = dampr.compact(model, example_inputs=x)
        dampr.save(small, tmp_path / "small.safetensors")
        loaded = dampr.load(tmp_path / "small.safetensors", NETWORKS[network][0]().eval())
        assert torch.equal(loaded(x), small(x))


def test_a_plan_trains_shrinks_and_arrives() -> None:
    torch.manual_seed(0)
    model, x = Blocks(OwnRMSNorm, width=24), words.repeat(4, 1)
    y = torch.randint(3, (len(x),))
    dampr.convert(model, example_inputs=x, residual=True, exclude="up.*")
    plan = dampr.Plan(model, x, macs=0.3, steps=60)
    optimizer = torch.optim.Adam(plan.model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (F.cross_entropy(plan.model(x), y) + plan.penalty()).backward()
        optimizer.step()
        plan.step(optimizer)
    small = plan.finish()
    assert not any(isinstance(m, (GatedParameter, OpenStatistics)) for m in small.modules())
    assert small.embedding.weight.shape[1] < 24
    assert count_macs(small, x) <= 0.31 * count_macs(Blocks(OwnRMSNorm, width=24), x)


def test_a_network_of_nothing_else_is_pruned_without_being_asked() -> None:
    torch.manual_seed(0)
    model, x = Gating().eval(), torch.randn(2, 5, 6)
    before = model(x)
    dampr.convert(model, example_inputs=x)
    assert torch.equal(model(x), before)
    cost = close_half(model, x)
    small = dampr.compact(model, example_inputs=x)
    assert count_macs(small, x) == int(cost(cost.decision())) < cost.total
    torch.testing.assert_close(small(x), model(x))


def test_a_failed_conversion_leaves_norms_as_they_were() -> None:
    class Fails(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            if any(name.endswith("open_statistics") for name, _ in self.named_modules()):
                raise ArithmeticError("only plain norms here")
            return super().forward(x)

    model = Fails(OwnRMSNorm)
    names = list(dict(model.named_modules()))
    with pytest.warns(dampr.prune.SightWarning, match="only plain norms here"), pytest.raises(dampr.ConversionError):
        dampr.convert(model, example_inputs=words, residual=True)
    assert list(dict(model.named_modules())) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_converted_model_compiles_without_a_graph_break() -> None:
    model, x = built("own RMSNorm")
    close_half(model, x)
    expected = model(x)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("held", [False, True])
def test_checkpointed_regions_draw_again_what_they_drew(held: bool) -> None:
    class Checkpointed(Blocks):
        reentrant: bool | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.embedding(x)
            for norm, up, down in zip(self.norms, self.up, self.down, strict=True):

                def block(x: Tensor, norm: Any = norm, up: Any = up, down: Any = down) -> Tensor:
                    return x + down(F.gelu(up(norm(x))))

                x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            return self.head(self.norm(x).mean(1))

    torch.manual_seed(0)
    first = dampr.convert(Checkpointed(OwnRMSNorm).eval(), words, residual=True)
    for gate in first.modules():
        if isinstance(gate, HardConcrete):
            nn.init.normal_(gate.log_alpha)
    found = []
    for reentrant in (None, False, True):
        model = dampr.gate_generator(copy.deepcopy(first).train(), seed=5)
        model.reentrant = reentrant
        with dampr.hold_draws(model) if held else contextlib.nullcontext():
            loss = model(words).square().sum()
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert any(bool(g.any()) for g in found[0])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_index_outlives_the_meta_device_and_to_empty() -> None:
    index = torch.tensor([1, -1, 0, 1])
    norm = nn.LayerNorm(4)
    put_on(norm, OpenStatistics(HardConcrete(2), index, centred=True))
    for moved in (copy.deepcopy(norm).to("meta").to_empty(device="cpu"), copy.deepcopy(norm).to_empty(device="cpu")):
        assert torch.equal(moved.open_statistics.index, index)
