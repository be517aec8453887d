"""Differentiable masks (a reconstruction) on the filters and neurons of LeNet-5-Caffe (Ramakrishnan et al. 2020; tables
not available).

Loss: task + lam1 sum |alpha| + lam2 ||W||^2. The second term keeps weights from growing while their scales shrink.
"""

from __future__ import annotations

import torch
from torch import nn

import dampr
from dampr.cli import demo
from examples import common


def main() -> None:
    args = common.arguments(__doc__, epochs=8, lam=2e-3, decay=1e-5, gate_lr=1e-2, count=20000)
    torch.manual_seed(args.seed)
    name, data = common.images(args.root, args.count)
    model = dampr.convert(demo.cnn(data.x.shape[1]), gate="diffmask", example_inputs=data.x_test[:64])
    gates = [layer.gate for layer in dampr.prune.gated_layers(model).values()]
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    def penalty(_: nn.Module) -> torch.Tensor:
        return dampr.gates.scale_penalty(gates, args.lam) + dampr.gates.square_penalty(weights, args.decay)

    seconds = common.train(model, data, epochs=args.epochs, penalty=penalty, gate_lr=args.gate_lr, settle=2)
    result = {
        "method": "diffmask",
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": seconds,
        **common.compacted(model, data),
    }
    common.finish(__file__, {**result, "published": "tables not available"}, not args.no_write)


if __name__ == "__main__":
    main()
