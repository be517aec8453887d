"""Parts of a width that code takes by numbers which a module keeps: the numbers follow the cut."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact, cut_in_half, finished, halved

Parts = tuple[Tensor, ...]


def by_tuple(net: Gated, y: Tensor) -> Parts:
    return torch.split(y, net.sizes, -1)  # type: ignore[arg-type]


def by_list(net: Gated, y: Tensor) -> Parts:
    return torch.split(y, net.listed, -1)


def by_attributes(net: Gated, y: Tensor) -> Parts:
    return torch.split(y, [net.gate, net.kept, net.mixed], -1)


def with_the_rest(net: Gated, y: Tensor) -> Parts:
    return torch.split(y, [net.gate, net.kept, y.shape[-1] - net.gate - net.kept], -1)


def by_slices(net: Gated, y: Tensor) -> Parts:
    return y[..., : net.gate], y[..., net.gate : net.gate + net.kept], y[..., net.gate + net.kept :]


def one_after_the_other(net: Gated, y: Tensor) -> Parts:
    gate, others = y[..., : net.gate], y[..., net.gate :]
    return gate, others[..., : net.kept], others[..., net.kept :]


def by_narrow(net: Gated, y: Tensor) -> Parts:
    return y.narrow(-1, 0, net.gate), *y.narrow(-1, net.gate, net.kept + net.mixed).split([net.kept, net.mixed], -1)


WAYS = [by_tuple, by_list, by_attributes, with_the_rest, by_slices, one_after_the_other, by_narrow]


class Gated(nn.Module):
    """As in MambaOut: one projection for a gate, what is kept, and what a convolution mixes."""

    def __init__(self, way: Callable[[Gated, Tensor], Parts], width: int = 20, mixed: int = 8) -> None:
        super().__init__()
        self.way = way
        self.gate, self.kept, self.mixed = width, width - mixed, mixed
        self.sizes = (width, width - mixed, mixed)
        self.listed = list(self.sizes)
        self.up, self.down = nn.Linear(8, 2 * width), nn.Linear(width, 8)
        self.conv = nn.Conv1d(mixed, mixed, 3, padding=1, groups=mixed)

    def forward(self, x: Tensor) -> Tensor:
        gate, kept, mixed = self.way(self, self.up(x))
        y: Tensor = self.down(F.gelu(gate) * torch.cat([kept, self.conv(mixed.mT).mT], -1))
        return y


def network(way: Callable[[Gated, Tensor], Parts]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), Gated(way), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_parts_are_cut_each_for_itself(way: Callable[[Gated, Tensor], Parts]) -> None:
    x = torch.randn(2, 5, 4)
    model = dampr.convert(network(way), example_inputs=x)
    assert sorted(gate.num_gates for gate in distinct_gates(model).values()) == [8, 8, 8, 12]
    assert_exact(network(way), x, at_most=0.4)


def test_parts_of_other_shares(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 4)
    model: Any = dampr.convert(network(by_tuple), example_inputs=x).eval()
    for gate in distinct_gates(model).values():
        gate.set_levels_(torch.where(torch.arange(gate.num_gates) < (7 if gate.num_gates == 12 else 2), -3.0, 3.0))
    small: Any = dampr.compact(model, x)
    assert small[1].sizes == (11, 5, 6)
    assert small[1].listed == [20, 12, 8]  # nobody reads it
    torch.testing.assert_close(small(x), model(x))
    large = dampr.expand(small)
    assert large[1].sizes == (20, 12, 8)
    torch.testing.assert_close(large(x), small(x))
    dampr.save(small, tmp_path / "small.pt")
    loaded: Any = dampr.load(tmp_path / "small.pt", network(by_tuple))
    assert loaded[1].sizes == (11, 5, 6)
    assert torch.equal(loaded(x), small(x))


def test_a_shrinker_moves_the_numbers() -> None:
    x, y = torch.randn(8, 5, 4), torch.randn(8, 5, 3)
    plan = dampr.Plan(network(by_list), x, macs=0.3, steps=80)
    small: Any = finished(plan, lambda: F.mse_loss(plan.model(x), y), 80)
    assert sum(small[1].listed) == small[1].up.out_features
    assert small[1].listed[0] == small[1].down.in_features


def test_numbers_in_the_code_are_no_attributes() -> None:
    x = torch.randn(2, 5, 4)
    model: Any = dampr.convert(network(lambda net, y: torch.split(y, [20, 12, 8], -1)), example_inputs=x)
    assert "1.up" in model.dampr_skipped
    assert_exact(network(lambda net, y: torch.split(y, [20, 12, 8], -1)), x, at_most=0.6)


class Partial(nn.Module):
    """As in FasterNet: a convolution of the first quarter of the channels, beside a residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_channels, self.untouched = width // 4, width - width // 4
        self.conv = nn.Conv2d(width // 4, width // 4, 3, padding=1, bias=False)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, width, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, rest = torch.split(x, [self.conv_channels, self.untouched], 1)
        y: Tensor = x + self.mlp(torch.cat([self.conv(first), rest], 1))
        return y


def test_a_stream_of_which_each_block_takes_a_part() -> None:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), Partial(16), Partial(16), *head)
    assert_exact(model, torch.randn(2, 3, 8, 8), at_most=0.4)


class Latent(nn.Module):
    """As in GAU: two wide parts of one size, and a narrow one that attention compares."""

    def __init__(self, width: int = 8, wide: int = 12, narrow: int = 5) -> None:
        super().__init__()
        self.e, self.s = wide, narrow
        self.uv, self.o = nn.Linear(width, 2 * wide + narrow), nn.Linear(wide, width)
        self.gamma = nn.Parameter(torch.rand(2, narrow) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        u, v, base = torch.split(F.silu(self.uv(x)), [self.e, self.e, self.s], -1)
        q, k = base * self.gamma[0], base * self.gamma[1]
        y: Tensor = self.o(u * (F.relu(q @ k.mT / 3) ** 2 @ v))
        return y


def test_parts_of_one_size_lose_the_same_units() -> None:
    x = torch.randn(2, 6, 8)
    assert 12 in [g.num_gates for g in distinct_gates(dampr.convert(Latent(), example_inputs=x)).values()]
    assert_exact(Latent(), x, at_most=0.8)


def delta(q: Tensor, k: Tensor, v: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A delta rule in one system of equations, for each head (Yang et al. 2024)."""
    scores = (k @ k.mT).tril(-1) / 8 + torch.eye(k.shape[2], dtype=k.dtype)
    return (q @ k.mT).tril() @ solve(scores, v)


SOLVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "triangular": functools.partial(torch.linalg.solve_triangular, upper=False),
    "solve": torch.linalg.solve,
    "inverse": lambda a, b: torch.linalg.inv(a) @ b,
    "cholesky": lambda a, b: torch.cholesky_solve(b, torch.linalg.cholesky(a @ a.mT)),
    "exponential": lambda a, b: torch.linalg.matrix_exp(a / 4) @ b,
}


class Heads(nn.Module):
    def __init__(self, solve: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads, self.solve = 4, solve
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, 4)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.out(delta(q, k, v, self.solve).transpose(1, 2).flatten(2))
        return y


@pytest.mark.parametrize("solve", SOLVES)
def test_systems_of_equations_in_each_head(solve: str) -> None:
    x = torch.randn(2, 5, 8)
    model = dampr.convert(Heads(SOLVES[solve]), example_inputs=x)
    assert [gate.num_gates for gate in distinct_gates(model).values()] == [4]
    assert_exact(Heads(SOLVES[solve]), x, at_most=0.6)


class InTraining(nn.Module):
    """Noise on the first channels, in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 10
        self.up, self.down = nn.Linear(4, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.training:
            y = torch.cat([y[..., : self.k] * 2, y[..., self.k :]], -1)
        out: Tensor = self.down(y.relu())
        return out


def test_a_number_that_only_training_takes_keeps_the_width() -> None:
    with pytest.raises(dampr.prune.ConversionError, match="picked by literal numbers"):
        dampr.convert(InTraining(), example_inputs=torch.randn(3, 4))


class Two(nn.Module):
    """A small part and a large one, each read by a layer of its own."""

    def __init__(self, how: str, small: int, large: int) -> None:
        super().__init__()
        self.how, self.small, self._sizes = how, small, (small, large)
        self.first, self.up = nn.Linear(4, 6), nn.Linear(6, small + large)
        self.of_small, self.of_large = nn.Linear(small, 5), nn.Linear(large, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.first(x).relu())
        if self.how == "tuple":
            small, large = y.split(self._sizes, -1)
        else:
            small, large = y[..., : self.small], y[..., self.small :]
        out: Tensor = self.of_small(small.relu()) + self.of_large(large.relu())
        return out


@pytest.mark.parametrize("sizes", [(2, 6), (2, 30), (3, 9), (4, 12), (6, 10), (8, 8)])
@pytest.mark.parametrize("how", ["tuple", "slices"])
def test_small_parts_follow_whatever_closes(how: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model: Any = dampr.convert(Two(how, *sizes).eval(), example_inputs=x)
    generator, fewest = torch.Generator().manual_seed(0), sum(sizes)
    for _ in range(4):
        other = copy.deepcopy(model)
        for gate in distinct_gates(other).values():
            keep = torch.rand(gate.num_gates, generator=generator) < 0.5
            gate.set_levels_(torch.where(keep | (torch.arange(gate.num_gates) == 1), 3.0, -3.0))
        small: Any = dampr.compact(other, x)
        torch.testing.assert_close(small(x), other.eval()(x))
        fewest = min(fewest, small.up.out_features)
    assert fewest < sum(sizes)
    dampr.save(small, tmp_path / "small.pt")
    assert torch.equal(dampr.load(tmp_path / "small.pt", Two(how, *sizes))(x), small(x))
    torch.testing.assert_close(dampr.expand(small)(x), small(x))


class Equal(nn.Module):
    """As in C2f: two parts of one size, of which one goes on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "tuple":
            self.sizes = (8, 8)
        else:
            self.c = 8
        self.up, self.inner, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        a, b = y.split(self.sizes, 1) if self.how == "tuple" else y.split((self.c, self.c), 1)  # type: ignore[arg-type]
        out: Tensor = self.out(torch.cat([a, b, self.inner(b).relu()], 1))
        return out


@pytest.mark.parametrize("how", ["tuple", "number"])
def test_parts_of_one_size_in_a_tuple(how: str) -> None:
    x = torch.randn(2, 3, 7, 7)
    assert "up" not in dampr.convert(Equal(how), example_inputs=x).dampr_skipped  # type: ignore[operator]
    assert_exact(Equal(how), x, at_most=0.5)


class Normed(nn.Module):
    """A norm without parameters over one part."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (6, 8)
        self.up, self.norm, self.out = nn.Conv2d(3, 14, 1), nn.InstanceNorm2d(6), nn.Conv2d(14, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).split(self.sizes, 1)  # type: ignore[arg-type]
        y: Tensor = self.out(torch.cat([self.norm(a), b], 1))
        return y


def test_a_norm_without_parameters_gets_its_size_back() -> None:
    x = torch.randn(2, 3, 5, 5)
    small: Any = cut_in_half(halved(dampr.convert(Normed().eval(), example_inputs=x)), x)
    large: Any = dampr.expand(small)
    assert (small.norm.num_features, large.norm.num_features, large.sizes) == (3, 6, (6, 8))
    torch.testing.assert_close(large(x), small(x))


class Steps(nn.Module):
    """Parts of one size and a shorter rest: their number would change with a cut."""

    def __init__(self, chunks: bool) -> None:
        super().__init__()
        self.part, self.chunks = 6, chunks
        self.first, self.up = nn.Linear(4, 6), nn.Linear(6, 16)
        self.readers = nn.ModuleList(nn.Linear(n, 5) for n in (6, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.first(x).relu())
        parts = y.chunk(3, -1) if self.chunks else y.split(self.part, -1)
        return torch.stack([read(part.relu()) for read, part in zip(self.readers, parts, strict=True)]).sum(0)


@pytest.mark.parametrize("chunks", [False, True])
def test_a_shorter_last_part_keeps_the_width(chunks: bool) -> None:
    model: Any = dampr.convert(Steps(chunks), example_inputs=torch.randn(3, 4))
    assert "picked by literal numbers" in model.dampr_skipped["up"]


class Twice(nn.Module):
    """One number for channels and for steps."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 10
        self.up, self.first, self.last = nn.Linear(4, 24), nn.Linear(10, 3), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x[:, -self.k :])
        out: Tensor = self.first(y[..., : self.k].relu()) + self.last(y[..., self.k :].relu())
        return out


def test_a_number_with_two_meanings_keeps_the_width() -> None:
    with pytest.raises(dampr.prune.ConversionError, match="something beside its layers has that width"):
        dampr.convert(Twice(), example_inputs=torch.randn(2, 13, 4))


class Windows(nn.Module):
    """One number for parts that overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = 5, 9
        self.up, self.first, self.second = nn.Linear(4, 14), nn.Linear(9, 3), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        out: Tensor = self.first(y[..., : self.b].relu()) + self.second(y[..., self.a :].relu())
        return out


def test_parts_that_overlap_keep_their_width() -> None:
    with pytest.raises(dampr.prune.ConversionError, match="something beside its layers has that width"):
        dampr.convert(Windows(), example_inputs=torch.randn(3, 4))


def test_a_model_with_gates_on_parameters_is_converted_once() -> None:
    model = dampr.convert(network(by_tuple), example_inputs=torch.randn(2, 5, 4))
    with pytest.raises(dampr.prune.ConversionError, match="has gates on its parameters already"):
        dampr.convert(model, example_inputs=torch.randn(2, 5, 4))


class Whitened(nn.Module):
    """Channels multiplied by a matrix of theirs: all are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        y: Tensor = self.down((torch.linalg.matrix_exp(h.mT @ h / 9) @ h.mT).mT)
        return y


def test_channels_that_equations_mix_stay() -> None:
    with pytest.raises(dampr.prune.ConversionError, match="its channels are mixed .linalg_matrix_exp"):
        dampr.convert(Whitened(), example_inputs=torch.randn(9, 4))


class Bounded(nn.Module):
    """Of images between 0 and 1, which refuses others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.max()) > 1 or float(x.min()) < 0:
            raise ValueError("expected values between 0 and 1")
        y: Tensor = self.layers(x)
        return y


def test_a_model_may_refuse_larger_inputs() -> None:
    assert_exact(Bounded(), torch.rand(2, 3, 5, 5), at_most=0.6)


def test_a_copy_keeps_its_numbers() -> None:
    x = torch.randn(2, 5, 4)
    model: Any = dampr.convert(network(by_list), example_inputs=x)
    other = copy.deepcopy(model)
    cut_in_half(halved(other), x)
    assert model[1].listed == other[1].listed == [20, 12, 8]
