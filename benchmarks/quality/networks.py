"""The networks that are pruned. Each is built from a tuple of widths, so that a narrow one is built by the same
function from smaller numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


def lenet5(widths: Sequence[int]) -> nn.Module:
    """LeNet-5 as in Caffe, on (n, 1, 28, 28): two convolutions of 5 x 5 with pooling, one hidden layer. The dense
    network has widths 20, 50, 500.
    """
    first, second, hidden = widths
    return nn.Sequential(
        nn.Conv2d(1, first, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 16, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def vgg(widths: Sequence[int]) -> nn.Module:
    """Pairs of 3 x 3 convolutions with BatchNorm, with pooling between the pairs, on (n, 3, 16, 16)."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(zip((3, *widths[:-1]), widths, strict=True)):
        if number and number % 2 == 0:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the residual stream changes its
    width.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-20 on (n, 3, 16, 16): three stages of three blocks.

    The widths are those of the three stages' residual streams, then the inner width of each block.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        streams, inner = widths[:3], widths[3:]
        self.stem = nn.Conv2d(3, streams[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(streams[0])
        blocks: list[nn.Module] = []
        inputs = streams[0]
        for number, hidden in enumerate(inner):
            stage, first = divmod(number, len(inner) // 3)
            blocks.append(Block(inputs, hidden, streams[stage], 2 if stage and not first else 1))
            inputs = streams[stage]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(streams[2], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.bn(self.stem(x))))
        classes: Tensor = self.head(y.mean((2, 3)))
        return classes


class RowGRU(nn.Module):
    """Two GRUs that read (n, 1, 28, 28) row by row; the class comes from the last state of the second."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        first, second = widths
        self.first = nn.GRU(28, first, batch_first=True)
        self.second = nn.GRU(first, second, batch_first=True)
        self.head = nn.Linear(second, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x.flatten(1, 2))
        y, _ = self.second(y)
        classes: Tensor = self.head(y[:, -1])
        return classes


class PatchTransformer(nn.Module):
    """Encoder layers, norms first, on the 49 patches of 4 x 4 pixels of (n, 1, 28, 28). The widths are that of the
    residual stream, then that of each feed-forward layer.

    A narrow transformer has a narrower stream with as many heads, as torch's attention cannot have fewer heads of the
    same size.
    """

    heads = 4

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        stream, *hidden = widths
        self.patches = nn.Linear(16, stream)
        self.position = nn.Parameter(torch.randn(49, stream) / 10)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(stream, self.heads, size, dropout=0.0, batch_first=True, norm_first=True)
            for size in hidden
        )
        self.norm = nn.LayerNorm(stream)
        self.head = nn.Linear(stream, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(F.unfold(x, 4, stride=4).transpose(1, 2)) + self.position
        for layer in self.layers:
            y = layer(y)
        classes: Tensor = self.head(self.norm(y).mean(1))
        return classes
