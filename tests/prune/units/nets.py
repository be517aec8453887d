"""Small networks of every structure that the tracer has to get right, with what it has to say of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import models
from tests.models import conv_norm


@dataclass
class Net:
    """``clusters``: how many free classes each cluster has, least first. ``same``: dimensions whose indices are in the
    same classes, one to one. ``stays``: dimensions of which nothing may go, and the kind of the reason.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    clusters: list[int]
    same: list[tuple[str, int, str, int]] = field(default_factory=list)
    stays: dict[tuple[str, int], str] = field(default_factory=dict)


def image(side: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, side, side, dtype=torch.float64)


def tokens(width: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 5, width, dtype=torch.float64)


def pooled(*layers: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class Written(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], read: int = 8) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(read, 6, 3, padding=1), between
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x).relu())).relu().mean((2, 3)))


class Transposed(nn.Module):
    """A U-Net that goes up with a transposed convolution."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), norm(12), nn.ReLU())
        self.up, self.out = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(torch.cat([self.up(self.middle(skip)), skip], 1))


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = conv_norm(3, 8), conv_norm(8, 6), nn.Linear(6, 5)
        self.factors = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.last(x * self.factors(x.mean((2, 3), keepdim=True))).mean((2, 3)))


class Cell(nn.Module):
    """A GRU's step written out, over time."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.kept, self.head = nn.Linear(6, 24), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.kept.in_features)
        for step in x.unbind(1):
            r, z, n = self.read(step).chunk(3, -1)
            s, u, m = self.kept(state).chunk(3, -1)
            z = torch.sigmoid(z + u)
            state = (1 - z) * torch.tanh(n + torch.sigmoid(r + s) * m) + z * state
        return self.head(state)


class Attention(nn.Module):
    """Attention by hand between two linear layers: query, key and value of one projection,
    or fewer keys and values than queries.
    """

    def __init__(self, heads: int = 4, shared: int = 0, size: int = 3) -> None:
        super().__init__()
        self.heads, self.shared, self.size = heads, shared or heads, size
        self.project = nn.Linear(6, (heads + 2 * self.shared) * size)
        self.out, self.head = nn.Linear(heads * size, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [self.heads * self.size, self.shared * self.size, self.shared * self.size]
        parts = self.project(x).split(sizes, -1) if self.shared != self.heads else self.project(x).chunk(3, -1)
        q, k, v = (t.view(*t.shape[:2], -1, self.size).transpose(1, 2) for t in parts)
        k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        mixed = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1) @ v
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)).relu())


class Grouped(nn.Module):
    """Grouped-query attention with projections of their own: two heads share each key and value."""

    def __init__(self, heads: int = 4, shared: int = 2, size: int = 3) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, heads * size), nn.Linear(6, shared * size), nn.Linear(6, shared * size)
        self.out, self.size, self.times = nn.Linear(heads * size, 3), size, heads // shared

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, self.times, -1, -1).flatten(1, 2) for t in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tied(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down(self.up(x).relu()))


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Token(nn.Module):
    """A class token before the patches, and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.position, self.up, self.head = nn.Parameter(torch.randn(1, 5, 8)), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.up(x).relu()[:, 0])


class Stream(nn.Module):
    """A residual stream that a LayerNorm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.up, self.down, self.head = (
            nn.Linear(6, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.down(self.up(self.norm(x)).relu()))


class Shuffled(nn.Module):
    """Channel shuffle by views, behind a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped, self.last, self.head = (
            conv_norm(3, 8),
            conv_norm(8, 8, groups=2),
            conv_norm(8, 6, 1),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.first(x)).unflatten(1, (self.grouped[0].groups, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(self.last(x).mean((2, 3)))


class Bare(nn.Module):
    """Products with parameters that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gain, self.b = (nn.Parameter(torch.randn(*size)) for size in ((6, 8), (8,), (10, 8)))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("nti,oi->nto", (x @ self.a).relu() * self.gain, self.b).relu())


class InPlace(nn.Module):
    """Two layers written into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 4), nn.Linear(6, 8), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = x.new_zeros(*x.shape[:2], self.a.weight.shape[0] + self.b.weight.shape[0])
        both[..., : self.a.weight.shape[0]] = self.a(x).relu()
        both[..., self.a.weight.shape[0] :] = self.b(x).relu()
        return self.head(both)


class Padded(nn.Module):
    """A layer written step by step into memory that keeps zeros behind the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.new_zeros(x.shape[0], x.shape[1] + 2, self.a.weight.shape[0])
        for step in range(x.shape[1]):
            steps[:, step] = self.a(x[:, step]).relu()
        return self.head(self.b(steps).relu())


class OneInPlace(nn.Module):
    """A layer with one channel is written into memory in front of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 1), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = x.new_zeros(*x.shape[:2], 4)
        both[..., :1] = self.a(x).relu()
        return self.head(self.b(both).relu())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def small(name: str, clusters: list[int], **expected: Any) -> Net:
    """One of tests/models.py."""
    return Net(lambda: models.ALL[name]()[0], lambda: _double(models.ALL[name]()[1]), clusters, **expected)


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


NETS: dict[str, Net] = {
    "mlp": small(
        "mlp",
        [16, 20],
        same=[("0.weight", 0, "2.weight", 1)],
        stays={("0.weight", 1): "constants", ("4.weight", 0): "output"},
    ),
    "cnn": small(
        "vgg", [8, 12, 16, 16, 24], same=[("0.0.weight", 0, "0.1.weight", 0), ("0.1.running_mean", 0, "1.0.weight", 1)]
    ),
    "flattened": small("lenet5", [6, 12, 20], same=[("3.weight", 0, "6.weight", 1)]),
    "residual sums": small("resnet18", [8, 8, 12, 12, 12], same=[("0.0.weight", 0, "1.conv.weight", 0)]),
    "depthwise": small("mobilenet_v2", [8, 16, 24], same=[("1.expand.0.weight", 0, "1.depthwise.0.weight", 0)]),
    "concatenated": small("densenet", [12, 20], same=[]),
    "shuffle units": small("shufflenet", [2, 4, 4]),
    "branches": small("inception", [6, 8, 12, 17]),
    "grouped": Net(
        lambda: pooled(conv_norm(3, 8), conv_norm(8, 12, groups=4), conv_norm(12, 6), width=6),
        image(),
        [4, 6],
        stays={("1.0.weight", 1): "split"},
    ),
    "group norm": Net(
        lambda: pooled(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), width=6),
        image(),
        [4, 6],
    ),
    "group norm of one group": Net(
        lambda: pooled(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 6, 3), nn.ReLU(), width=6),
        image(),
        [6],
        stays={("0.weight", 0): "statistic"},
    ),
    "squeeze and excitation": Net(Squeeze, image(), [4, 6, 8], same=[("first.0.weight", 0, "factors.2.weight", 0)]),
    "GRU cell by hand": Net(Cell, tokens(6), [8], same=[("head.weight", 1, "kept.weight", 1)]),
    "attention, one projection": Net(Attention, tokens(6), [4, 8]),
    "attention, shared keys, split by number": Net(
        lambda: Attention(4, 2), tokens(6), [8], stays={("project.weight", 0): "picked"}
    ),
    "grouped queries": Net(Grouped, tokens(6), [2], same=[("k.weight", 0, "k.bias", 0)]),
    "tied": Net(Tied, lambda: torch.randint(0, 20, (2, 5)), [8, 12], stays={("embed.weight", 0): "picked"}),
    "weight standardisation": Net(
        lambda: pooled(
            Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), width=4
        ),
        image(),
        [4, 6],
        stays={("0.weight", 0): "statistic", ("2.weight", 1): "statistic"},
    ),
    "pixel shuffle": Net(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 16, 3), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(4, 3, 3)
        ),
        image(),
        [4, 6],
    ),
    "channel shuffle": Net(Shuffled, image(), [2, 6], same=[]),
    "transposed convolution": Net(Transposed, image(), [12, 16], same=[("middle.0.weight", 0, "up.weight", 0)]),
    "grouped transposed convolution": Net(
        lambda: pooled(
            conv_norm(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), nn.ReLU(), conv_norm(12, 6), width=6
        ),
        image(),
        [4, 6],
    ),
    "layer norm": Net(
        Stream, tokens(6), [12], stays={("first.weight", 0): "statistic", ("down.weight", 0): "statistic"}
    ),
    "local response norm": Net(
        lambda: Written(nn.LocalResponseNorm(3)), image(), [6], stays={("first.weight", 0): "mixed"}
    ),
    "softmax over channels": Net(
        lambda: Written(lambda h: h.softmax(1)), image(), [6], stays={("first.weight", 0): "mixed"}
    ),
    "centred channels": Net(
        lambda: Written(lambda h: h - h.mean(1, keepdim=True)), image(), [6], stays={("first.weight", 0): "statistic"}
    ),
    "constants per channel": Net(
        lambda: Written(lambda h: h * torch.linspace(1, 2, 8, dtype=h.dtype).view(1, -1, 1, 1)),
        image(),
        [6],
        stays={("first.weight", 0): "constants"},
    ),
    "uniform constants": Net(
        lambda: Written(lambda h: h * torch.ones(h.shape[1], 1, 1, dtype=h.dtype)), image(), [6, 8]
    ),
    "a literal slice": Net(
        lambda: Written(lambda h: torch.cat([h[:, :3], h[:, 3:] * 2], 1)),
        image(),
        [6],
        stays={("first.weight", 0): "picked"},
    ),
    "a loop over channels": Net(
        lambda: Written(lambda h: torch.stack([h[:, i] * (i + 1) for i in range(h.shape[1])], 1)),
        image(),
        [6],
        stays={("first.weight", 0): "picked"},
    ),
    "unfolded and folded": Net(
        lambda: Written(lambda h: F.fold(F.unfold(h, 3, padding=1), h.shape[-2:], 3, padding=1)), image(), [6, 8]
    ),
    "maxout": Net(lambda: Written(lambda h: h.unflatten(1, (-1, 2)).amax(2), read=4), image(), [4, 6]),
    "class token": Net(
        Token, image(), [8, 12], same=[("patch.weight", 0, "token", 2), ("position", 2, "up.weight", 1)]
    ),
    "bare parameters": Net(Bare, tokens(6), [8, 10], same=[("a", 1, "gain", 0), ("gain", 0, "b", 1)]),
    "written in place": Net(InPlace, tokens(6), [8], stays={("a.weight", 0): "picked"}),
    "written step by step": Net(Padded, tokens(6), [7, 8], same=[("a.weight", 0, "b.weight", 1)]),
    "one channel in place": Net(OneInPlace, tokens(6), [8], stays={("b.weight", 1): "constants"}),
    "LSTM": Net(lambda: Recurrent(nn.LSTM), tokens(6), [8], same=[("rnn.weight_hh_l0", 1, "head.weight", 1)]),
    "GRU": Net(lambda: Recurrent(nn.GRU), tokens(6), [8], same=[("rnn.weight_hh_l0", 1, "head.weight", 1)]),
}
