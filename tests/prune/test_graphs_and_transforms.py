"""Networks on graphs (messages that are scattered, sparse matrices, data in an object) and in the frequency domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dampr
from dampr.prune import values
from dampr.prune.summary import distinct_gates
from tests.halves import assert_exact


def edges() -> Tensor:
    return torch.randint(4, (2, 9), generator=torch.Generator().manual_seed(0))


class Messages(nn.Module):
    """Sums of messages from both ends of each edge."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.message, self.head = nn.Linear(8, 16), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = self.first(x)
        m = F.relu(self.message(torch.cat([h[edges[0]], h[edges[1]]], -1)))
        y: Tensor = self.head(torch.zeros_like(h).scatter_add_(0, edges[1][:, None].expand_as(m), m))
        return y


class Means(nn.Module):
    """Means over neighbours, then the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h, (out, to) = F.relu(self.first(x)), edges
        count = torch.zeros(len(x)).scatter_add(0, to, torch.ones(len(to))).clamp(min=1)
        index = to[:, None].expand(-1, h.shape[1])
        mean = torch.zeros(len(x), h.shape[1]).scatter_add(0, index, h[out]) / count[:, None]
        most = torch.zeros_like(mean).scatter_reduce(0, index, mean[out], "amax")
        y: Tensor = self.head(F.relu(self.second(most)))
        return y


class Sparse(nn.Module):
    """A layer of a graph convolution with a sparse matrix in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("adjacency", (torch.rand(4, 4) > 0.5).float().to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(torch.sparse.mm(self.adjacency, self.first(x))))
        return y


@dataclass
class Graph:
    x: Tensor
    edges: Tensor
    name: str = "a graph"


class Plain:
    """An object with tensors, as libraries for graphs have."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        self.x, self.held = x, {"edges": [edges]}

    @property
    def edges(self) -> Tensor:
        return self.held["edges"][0]


class OfObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Messages()

    def forward(self, graph: Any) -> Tensor:
        y: Tensor = self.inner(graph.x, graph.edges)
        return y


class Spectral(nn.Module):
    """A layer of a Fourier neural operator (Li et al. 2021): the lowest frequencies are mixed, the others are 0."""

    def __init__(self, width: int, kept: int, dims: int, like: bool) -> None:
        super().__init__()
        self.out_channels, self.kept, self.dims, self.like = width, kept, dims, like
        shape = (width, width, *(kept,) * dims)
        self.low = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / width)
        self.high = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / width) if dims > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        over, kept, pixels = tuple(range(-self.dims, 0)), self.kept, "xy"[: self.dims]
        f, equation = torch.fft.rfftn(x, dim=over), f"bi{pixels},io{pixels}->bo{pixels}"
        shape = (len(x), self.out_channels, *f.shape[2:])
        y = torch.zeros_like(f) if self.like else torch.zeros(shape, dtype=torch.cfloat)
        if self.dims == 1:
            y[:, :, :kept] = torch.einsum(equation, f[:, :, :kept], self.low)
        else:
            y[:, :, :kept, :kept] = torch.einsum(equation, f[:, :, :kept, :kept], self.low)
            y[:, :, -kept:, :kept] = torch.einsum(equation, f[:, :, -kept:, :kept], self.high)
        return torch.fft.irfftn(y, s=x.shape[2:], dim=over)


class Fourier(nn.Module):
    def __init__(self, dims: int, like: bool = False) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.lift, self.first, self.head = conv(3, 8, 1), conv(8, 12, 1), conv(12, 1, 1)
        self.spectral = nn.ModuleList(Spectral(8, 3, dims, like) for _ in range(2))
        self.beside = nn.ModuleList(conv(8, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        for spectral, beside in zip(self.spectral, self.beside, strict=True):
            x = F.gelu(spectral(x) + beside(x))
        y: Tensor = self.head(F.gelu(self.first(x)))
        return y


class Half(nn.Module):
    """Writes the first half of its channels into zeros that have all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        y, half = torch.zeros_like(h), h.shape[1] // 2
        y[:, :half] = h[:, :half]
        z: Tensor = self.head(y + h)
        return z


class Turned(nn.Module):
    """Writes rows into a view with other dimensions than the memory has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        memory = torch.zeros(2, 6, h.shape[1])
        memory.view(12, -1)[:4] = h
        memory.transpose(0, 1)[3:, 1] = h[:3]
        y: Tensor = self.head(memory.flatten(0, 1))
        return y


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.head = nn.Linear(8, 16), nn.Bilinear(16, 8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.both(F.relu(self.first(x)), x)))
        return y


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 16, dtype=torch.cfloat), nn.Linear(16, 4, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.first(x.cfloat())).abs()
        return y


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "messages": lambda: (Messages(), (torch.randn(4, 8), edges())),
    "means": lambda: (Means(), (torch.randn(4, 8), edges())),
    "a sparse matrix": lambda: (Sparse(), torch.randn(4, 8)),
    "a dataclass": lambda: (OfObjects(), Graph(torch.randn(4, 8), edges())),
    "an object": lambda: (OfObjects(), (Plain(torch.randn(4, 8), edges()),)),
    "a half, into zeros": lambda: (Half(), torch.randn(4, 8)),
    "rows, into views of other shapes": lambda: (Turned(), torch.randn(4, 8)),
    "bilinear": lambda: (Pair(), torch.randn(4, 8)),
    "complex weights": lambda: (Complex(), torch.randn(4, 8)),
    "frequencies": lambda: (Fourier(1), torch.randn(2, 3, 16)),
    "frequencies, zeros_like": lambda: (Fourier(1, like=True), torch.randn(2, 3, 16)),
    "frequencies of images": lambda: (Fourier(2), torch.randn(2, 3, 8, 8)),
    "frequencies of images, zeros_like": lambda: (Fourier(2, like=True), torch.randn(2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_cut_as_it_is_masked_and_costs_what_was_foretold(name: str) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    assert_exact(model, x, at_most=0.9)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(("like", "widths"), [(False, [8, 8, 8, 12]), (True, [8, 12])])
def test_every_width_of_a_fourier_network_can_go(dims: int, like: bool, widths: list[int]) -> None:
    model = dampr.convert(Fourier(dims, like).eval(), example_inputs=torch.randn(2, 3, *(8,) * dims))
    assert sorted(gate.num_gates for gate in distinct_gates(model).values()) == widths
    assert set(cast(Any, model).dampr_skipped) == {"head"}


def test_tensors_in_objects_are_replaced_in_copies() -> None:
    graph, plain = Graph(torch.ones(2), torch.arange(2)), Plain(torch.ones(2), torch.arange(2))
    found = values.with_tensors(lambda t: t + 1, {"a": [graph], "b": plain, "c": (torch.zeros(1), "text", None)})
    assert found["a"][0].name == "a graph"
    assert torch.equal(found["a"][0].x, torch.full((2,), 2.0))
    assert torch.equal(found["b"].edges, torch.arange(2) + 1)
    assert found["c"][1:] == ("text", None)
    assert torch.equal(graph.x, torch.ones(2))
    assert torch.equal(plain.edges, torch.arange(2))


def test_inputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(TypeError, match="expected a tensor, a tuple of positional or a dict of keyword arguments"):
        dampr.convert(OfObjects(), example_inputs=(object(), {"x": 3}))
