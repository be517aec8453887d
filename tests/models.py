"""Networks with the structures that pruning has to get right: ``ALL`` has a function that makes (model, example inputs)
for each small one, ``FULL`` for the published ones as deep and wide as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(read: int, written: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(read, written, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(written),
        nn.ReLU(),
    )


class BasicBlock(nn.Module):
    """ResNet-18 and the CIFAR ResNets (He et al. 2016), with a 1 x 1 convolution where widths or sizes change."""

    def __init__(self, read: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_norm(read, width, stride=stride)
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        same = read == width and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(read, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(self.first(x))) + self.shortcut(x))


class Bottleneck(nn.Module):
    """ResNet-50."""

    def __init__(self, read: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.reduce, self.conv = conv_norm(read, width, 1), conv_norm(width, width, 3, stride)
        self.expand, self.norm = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        same = read == 4 * width and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(read, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.expand(self.conv(self.reduce(x)))) + self.shortcut(x))


class PreActivation(nn.Module):
    """PreResNet: norms read the residual stream (He et al. 2016b)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseBlock(nn.Module):
    """DenseNet: each layer reads all before it (Huang et al. 2017)."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv_norm(width + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class InvertedResidual(nn.Module):
    """MobileNetV2 (Sandler et al. 2018); with ``squeeze``, V3's squeeze and excitation."""

    def __init__(self, width: int, inner: int, squeeze: int = 0) -> None:
        super().__init__()
        self.expand, self.depthwise = conv_norm(width, inner, 1), conv_norm(inner, inner, 3, groups=inner)
        self.project, self.norm = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.squeeze = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(inner, squeeze, 1),
                nn.ReLU(),
                nn.Conv2d(squeeze, inner, 1),
                nn.Hardsigmoid(),
            )
            if squeeze
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        if self.squeeze is not None:
            y = y * self.squeeze(y)
        return x + self.norm(self.project(y))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass by, then all are shuffled (Ma et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        depthwise = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half))
        self.branch = nn.Sequential(conv_norm(half, half, 1), depthwise, conv_norm(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.branch(right)], 1)
        return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class Inception(nn.Module):
    """Branches of several kernel sizes, concatenated (Szegedy et al. 2015)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_norm(width, 4, 1),
                nn.Sequential(conv_norm(width, 6, 1), conv_norm(6, 8)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(width, 5, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class UNet(nn.Module):
    """One level down and up, with the skip connection concatenated (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = conv_norm(3, 8), nn.Sequential(nn.MaxPool2d(2), conv_norm(8, 12))
        self.up, self.out = conv_norm(20, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.out(self.up(torch.cat([skip, F.interpolate(self.middle(skip), scale_factor=2)], 1)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, written with linear layers (ViT, GPT-2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, two blocks, the mean (Dosovitskiy et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 4, 16) / 10)
        self.blocks, self.norm, self.head = (
            nn.Sequential(TransformerBlock(16, 2), TransformerBlock(16, 2)),
            nn.LayerNorm(16),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def _net(*layers: nn.Module, width: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(conv_norm(3, 8), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def _image(side: int = 8) -> Tensor:
    return torch.randn(2, 3, side, side)


def mlp() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)), torch.randn(
        4, 12
    )


def lenet5() -> tuple[nn.Module, Any]:
    features = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), _image()


def vgg() -> tuple[nn.Module, Any]:
    layers = [conv_norm(8, 12), nn.MaxPool2d(2), conv_norm(12, 16), conv_norm(16, 16), nn.MaxPool2d(2)]
    return nn.Sequential(
        conv_norm(3, 8), *layers, nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5)
    ), _image()


ALL: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "mlp": mlp,
    "lenet5": lenet5,
    "vgg": vgg,
    "resnet18": lambda: (_net(BasicBlock(8, 8), BasicBlock(8, 12, 2), BasicBlock(12, 12), width=12), _image()),
    "resnet50": lambda: (_net(Bottleneck(8, 4), Bottleneck(16, 4), Bottleneck(16, 6, 2), width=24), _image()),
    "preresnet": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            PreActivation(8, 12),
            PreActivation(8, 10),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ),
        _image(),
    ),
    "densenet": lambda: (_net(DenseBlock(8, 4, 3), conv_norm(20, 12, 1), width=12), _image()),
    "mobilenet_v2": lambda: (_net(InvertedResidual(8, 24), InvertedResidual(8, 16), width=8), _image()),
    "mobilenet_v3": lambda: (_net(InvertedResidual(8, 24, 6), width=8), _image()),
    "shufflenet": lambda: (_net(ShuffleUnit(8), ShuffleUnit(8), width=8), _image()),
    "inception": lambda: (_net(Inception(8), conv_norm(17, 12), width=12), _image()),
    "unet": lambda: (UNet(), _image()),
    "vit": lambda: (ViT(), _image()),
}


def _stages(block: type[nn.Module], read: int, stages: list[tuple[int, int]], times: int = 1) -> list[nn.Module]:
    """(width, count) of each stage; all but the first halve the image, and a block writes ``times`` its width."""
    blocks = []
    for stage, (width, count) in enumerate(stages):
        for index in range(count):
            blocks.append(block(read, width, 2 if stage and not index else 1))
            read = times * width
    return [*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, 10)]


def _resnet(block: type[nn.Module], counts: list[int], times: int) -> nn.Module:
    stem = conv_norm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *_stages(block, 64, list(zip((64, 128, 256, 512), counts, strict=True)), times))


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    read = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [conv_norm(read if index == 0 else width, width) for index in range(count)] + [nn.MaxPool2d(2)]
        read = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


FULL: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "vgg16-bn": lambda: (vgg16(), _image(32)),
    "resnet18": lambda: (_resnet(BasicBlock, [2, 2, 2, 2], 1), _image(64)),
    "resnet50": lambda: (_resnet(Bottleneck, [3, 4, 6, 3], 4), _image(64)),
    "resnet56": lambda: (
        nn.Sequential(conv_norm(3, 16), *_stages(BasicBlock, 16, [(16, 9), (32, 9), (64, 9)])),
        _image(32),
    ),
}
