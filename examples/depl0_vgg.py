"""Dep-L0 on a small VGG with batch norm: one generator makes the gates of all layers, which sit between norm and ReLU,
drawn per image.

Li and Ji 2021 train VGG16 on CIFAR-10 for 299 epochs with the same penalty; their tables were not available. Here: six
convolutions of a quarter of the width, Fashion-MNIST padded to 32 x 32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import dampr
from examples import common

WIDTHS = (16, 16, 0, 32, 32, 0, 64, 64, 0)  # 0 is a pooling layer


def vgg() -> nn.Sequential:
    layers: list[nn.Module] = []
    read = 1
    for width in WIDTHS:
        if width:
            layers += [nn.Conv2d(read, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            read = width
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * read, 10))


def main() -> None:
    args = common.arguments(__doc__, epochs=6, lam=1e-4, gate_lr=5e-3, count=20000)
    torch.manual_seed(args.seed)
    name, data = common.images(args.root, args.count)
    side = round(data.x.shape[1] ** 0.5)
    pad = (32 - side) // 2
    x, x_test = (F.pad(t.view(-1, 1, side, side), (pad, 32 - side - pad) * 2) for t in (data.x, data.x_test))
    data = data._replace(x=x, x_test=x_test)
    model = dampr.convert(vgg(), gate="dep_l0", include=[nn.Conv2d], example_inputs=x_test[:8])
    generator = next(m for m in model.modules() if isinstance(m, dampr.gates.DependencyGenerator))
    areas = [9] * len(generator.sizes)
    penalty = lambda _: generator.penalty(areas, args.lam, first=1)  # noqa: E731
    seconds = common.train(model, data, epochs=args.epochs, penalty=penalty, gate_lr=args.gate_lr, settle=2)
    result = {
        "method": "dep_l0",
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": seconds,
        **common.compacted(model, data),
    }
    common.finish(__file__, {**result, "published": "tables not available"}, not args.no_write)


if __name__ == "__main__":
    main()
