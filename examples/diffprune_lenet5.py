"""DiffPrune (a reconstruction) on LeNet-5-Caffe: stochastic one-sided gates on filters and neurons (Shulman 2020:
MNIST error 0.6 %).
"""

from __future__ import annotations

import functools

import torch

import dampr
from dampr.cli import demo
from examples import common


def main() -> None:
    args = common.arguments(__doc__, epochs=8, macs=0.25, count=20000)
    torch.manual_seed(args.seed)
    name, data = common.images(args.root, args.count)
    gate = functools.partial(dampr.gates.DiffPrune, stochastic=True, init_sigma=0.3)
    _, found = common.to_budget(
        demo.cnn(data.x.shape[1]), data, macs=args.macs, epochs=args.epochs, gate=gate, score="learned"
    )
    result = {"method": "diffprune", "data": name, "seed": args.seed, "epochs": args.epochs, **found}
    common.finish(
        __file__, {**result, "published": "MNIST, LeNet-5: error 0.6 % (sizes not available)"}, not args.no_write
    )


if __name__ == "__main__":
    main()
