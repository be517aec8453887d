"""DiffPrune (a reconstruction) on LeNet-5-Caffe: stochastic one-sided gates on filters and neurons (Shulman 2020: MNIST error 0.6 %)."""

from __future__ import annotations

import functools

import torch
from torch import nn

import dampr
from dampr import demo
from examples import common


def main() -> None:
    args = common.arguments(__doc__, epochs=8, lam=0.3, gate_lr=2e-2, count=20000)
    torch.manual_seed(args.seed)
    name, data = common.images(args.root, args.count)
    gate = functools.partial(dampr.gates.DiffPrune, stochastic=True)
    model = dampr.convert(demo.cnn(data.x.shape[1]), gate=gate, example_inputs=data.x_test[:64])
    macs = demo.layer_macs(model, data.x[:1])

    def penalty(_: nn.Module) -> torch.Tensor:
        return args.lam / len(data.x) * demo.expected_macs(macs)

    seconds = common.train(model, data, epochs=args.epochs, penalty=penalty, gate_lr=args.gate_lr, settle=2)
    result = {
        "method": "diffprune",
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": seconds,
        **common.compacted(model, data),
    }
    common.finish(__file__, {**result, "published": "MNIST, LeNet-5: error 0.6 % (sizes not available)"}, not args.no_write)


if __name__ == "__main__":
    main()
