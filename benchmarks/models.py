"""The networks that the convolution benchmarks train: ResNet-50 and VGG16 with batch norm, as their papers have them,
and one residual block.
"""

from __future__ import annotations

from torch import Tensor, nn


def conv_norm(read: int, written: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and a batch norm after it."""
    return nn.Sequential(nn.Conv2d(read, written, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(written))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity shortcut (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv_norm(width, width, 3), conv_norm(width, width, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(x + self.second(self.relu(self.first(x))))
        return y


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 (with the stride) and 1 x 1 with four times the width, beside a shortcut, which is a
    1 x 1 convolution where the sizes differ.
    """

    def __init__(self, read: int, width: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.spatial, self.expand = (
            conv_norm(read, width, 1),
            conv_norm(width, width, 3, stride),
            conv_norm(width, 4 * width, 1),
        )
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if read == 4 * width and stride == 1 else conv_norm(read, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.spatial(self.relu(self.reduce(x))))
        y: Tensor = self.relu(self.shortcut(x) + self.expand(inner))
        return y


def resnet50(classes: int = 1000) -> nn.Sequential:
    """ResNet-50 for 224 x 224 images: 25,557,032 parameters with 1,000 classes."""
    layers: list[nn.Module] = [conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    read = 64
    for stage, (width, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(count):
            layers.append(Bottleneck(read, width, 2 if stage > 0 and block == 0 else 1))
            read = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, classes))


def vgg16(classes: int = 10) -> nn.Sequential:
    """VGG16 with batch norm for 32 x 32 images, one linear layer (configuration D as Dep-L0 uses it)."""
    layers: list[nn.Module] = []
    read = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(read, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            read = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes))
