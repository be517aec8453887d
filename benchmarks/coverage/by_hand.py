"""Networks as people write them by hand, of kinds that no library names."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(read: int, written: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, a batch norm and SiLU."""
    layer = nn.Conv2d(read, written, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(written), nn.SiLU())


class UNet(nn.Module):
    """A U-Net with transposed convolutions and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = self._block(3, 16), self._block(16, 24), self._block(24, 32)
        self.up_b, self.up_a = nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(24, 16, 2, 2)
        self.back_b, self.back_a, self.out = self._block(48, 24), self._block(32, 16), nn.Conv2d(16, 2, 1)

    @staticmethod
    def _block(read: int, written: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(read, written, 3, padding=1), nn.GroupNorm(8, written), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        c = self.c(F.max_pool2d(b, 2))
        b = self.back_b(torch.cat([self.up_b(c), b], 1))
        return self.out(self.back_a(torch.cat([self.up_a(b), a], 1)))


class C2f(nn.Module):
    """YOLOv8's block: the width is split in halves, one goes through a chain of blocks, and all results are read at the
    end.
    """

    def __init__(self, read: int, written: int, count: int = 2) -> None:
        super().__init__()
        half = written // 2
        self.first, self.last = conv(read, written, 1), conv((2 + count) * half, written, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv(half, half), conv(half, half)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Features at two scales with a top-down path, and a detection head on each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c3, self.down = conv(3, 16, 3, 2), C2f(16, 32), conv(32, 48, 3, 2)
        self.c4, self.merge = C2f(48, 48), C2f(80, 32)
        self.heads = nn.ModuleList(nn.Sequential(conv(width, 24), nn.Conv2d(24, 9, 1)) for width in (32, 48))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.c3(self.stem(x))
        coarse = self.c4(self.down(fine))
        fine = self.merge(torch.cat([fine, F.interpolate(coarse, scale_factor=2)], 1))
        return [self.heads[0](fine), self.heads[1](coarse)]


class SelfAttention(nn.Module):
    """nanoGPT's attention: query, key and value come from one matrix and are split by the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_head, self.n_embd = heads, width

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (t.view(batch, length, self.n_head, t.shape[-1] // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, -1))


class NanoGPT(nn.Module):
    """A decoder of two layers whose head shares its weight with the word embedding."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, width), nn.Embedding(16, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.attentions = nn.ModuleList(SelfAttention(width, 4) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x))


class CBAM(nn.Module):
    """Attention over channels, from their means and maxima, then over places, from means and maxima over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 32), conv(32, 48), nn.Linear(48, 5)
        self.mlp, self.place = (
            nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32)),
            nn.Conv2d(2, 1, 7, padding=3),
        )
        self.third = conv(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x * torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))[:, :, None, None]
        x = x * torch.sigmoid(self.place(torch.stack([x.mean(1), x.amax(1)], 1)))
        return self.head(self.third(self.second(x)).mean((2, 3)))


class AttentionPooling(nn.Module):
    """A weighted mean over positions, with weights from a softmax over scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.score, self.second, self.head = (
            nn.Linear(12, 48),
            nn.Linear(48, 1),
            nn.Linear(48, 32),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        weights = self.score(x).softmax(1)
        return self.head((self.second(x).relu() * weights).sum(1))


class Experts(nn.Module):
    """A mixture of two experts with soft weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route, self.head = nn.Linear(12, 24), nn.Linear(24, 2), nn.Linear(24, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        shares = self.route(x).softmax(-1)
        return self.head(x + sum(shares[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts)))


class Siamese(nn.Module):
    """Two inputs through the same trunk, then compared."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv(3, 16), conv(16, 32, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 24)
        )
        self.head = nn.Linear(24, 1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.trunk(a), self.trunk(b)
        return self.head((a - b).abs()), F.cosine_similarity(a, b)


class SuperResolution(nn.Module):
    """Pixel shuffles, each of which turns four channels into one of twice the height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.wide = (
            nn.Conv2d(3, 24, 5, padding=2),
            nn.Conv2d(24, 24, 3, padding=1),
            nn.Conv2d(24, 64, 3, padding=1),
        )
        self.last = nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.wide(self.middle(self.first(x).relu()).relu()), 2)
        return F.pixel_shuffle(self.last(x.relu()), 2)


class TCN(nn.Module):
    """Dilated causal convolutions whose weights are normalised."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        widths = [6, 24, 24, 24]
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(read, written, 3, dilation=2**i))
            for i, (read, written) in enumerate(itertools.pairwise(widths))
        )
        self.mix, self.head = nn.Conv1d(24, 32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.convs):
            y = layer(F.pad(x, (2 * 2**i, 0))).relu()
            x = y if x.shape != y.shape else x + y
        return self.head(self.mix(x).relu()[..., -1])


class Discriminator(nn.Module):
    """A GAN's discriminator with spectral norms."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.convs = nn.ModuleList(
            norm(nn.Conv2d(read, written, 4, 2, 1)) for read, written in ((3, 16), (16, 32), (32, 48))
        )
        self.mix, self.head = nn.Conv2d(48, 48, 1), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = F.leaky_relu(layer(x), 0.2)
        return self.head(F.leaky_relu(self.mix(x), 0.2).mean((2, 3)))


class LanguageModel(nn.Module):
    """An LSTM whose final state is returned besides the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.project = nn.Embedding(50, 24), nn.Linear(24, 32)
        self.rnn, self.wide, self.head = nn.LSTM(32, 40, batch_first=True), nn.Linear(40, 64), nn.Linear(64, 50)

    def forward(self, words: Tensor) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.project(self.words(words)).relu())
        return self.head(self.wide(y).relu()), state


class TiedAutoencoder(nn.Module):
    """A decoder that uses the encoder's weights, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        code = self.second(self.first(x).relu()).relu()
        return F.linear(F.linear(code, self.second.weight.t()).relu(), self.first.weight.t())


def _image(*shape: int) -> Tensor:
    return torch.randn(2, 3, *shape)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "unet": lambda: (UNet(), _image(32, 32)),
    "yolo": lambda: (Yolo(), _image(32, 32)),
    "nanogpt": lambda: (NanoGPT(), torch.randint(0, 50, (2, 9))),
    "cbam": lambda: (CBAM(), _image(16, 16)),
    "attention pooling": lambda: (AttentionPooling(), torch.randn(2, 9, 12)),
    "experts": lambda: (Experts(), torch.randn(2, 9, 12)),
    "siamese": lambda: (Siamese(), (_image(16, 16), _image(16, 16))),
    "pixel shuffle": lambda: (SuperResolution(), _image(16, 16)),
    "tcn": lambda: (TCN(), torch.randn(2, 6, 16)),
    "discriminator": lambda: (Discriminator(), _image(32, 32)),
    "lstm language model": lambda: (LanguageModel(), torch.randint(0, 50, (2, 9))),
    "tied autoencoder": lambda: (TiedAutoencoder(), torch.randn(4, 20)),
}
