"""Five gate families on one task at one target size: LeNet-5-Caffe, the same epochs and the same target of expected MACs, several seeds.

Every family gets the same penalty: a multiplier, which grows while the expected share of MACs is above the target, times that share.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch import Tensor, nn

import dampr
from dampr import demo
from examples import common

FAMILIES: dict[str, Any] = {
    "hard_concrete": "hard_concrete",
    "dep_l0": "dep_l0",
    "dam": functools.partial(dampr.gates.DiscriminativeMask, min_open=1),
    "diffprune": functools.partial(dampr.gates.DiffPrune, stochastic=True),
    "diffmask": "diffmask",
}


class Target:
    """multiplier * (expected share of MACs - target), the multiplier raised at every step that finds the share too large."""

    def __init__(self, macs: list[tuple[nn.Module, int]], target: float, rate: float) -> None:
        self.macs, self.target, self.rate, self.multiplier = macs, target, rate, 0.0
        self.total = sum(count for _, count in macs)

    def __call__(self, _: nn.Module) -> Tensor:
        excess = demo.expected_macs(self.macs) / self.total - self.target
        self.multiplier = max(0.0, self.multiplier + self.rate * float(excess.detach()))
        return self.multiplier * excess


def main() -> None:
    args = common.arguments(__doc__, epochs=6, count=10000, seeds=3, target=0.25)
    name, data = common.images(args.root, args.count)
    runs: list[dict[str, Any]] = []
    for family in ("dense", *FAMILIES):
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            start, model = time.perf_counter(), demo.cnn(data.x.shape[1])
            if family == "dense":
                common.train(model, data, epochs=args.epochs, lr=2e-3)
                found = {"accuracy": common.accuracy(model, data), "open": "", "macs": 0, "macs_dense": 0}
                found["macs"] = found["macs_dense"] = sum(count for _, count in demo.layer_macs(model, data.x[:1]))
            else:
                dampr.convert(model, gate=FAMILIES[family], example_inputs=data.x_test[:8])
                target = Target(demo.layer_macs(model, data.x[:1]), args.target, rate=0.1)
                rate = 3e-3 if family == "dep_l0" else 2e-2
                common.train(model, data, epochs=args.epochs, lr=2e-3, penalty=target, gate_lr=rate, settle=2)
                found = common.compacted(model, data)
            runs.append({"family": family, "seed": seed, "seconds": time.perf_counter() - start, **found})
            print(family, seed, f"{found['accuracy']:.4f}", f"{found['macs'] / found['macs_dense']:.1%}", found["open"], flush=True)
    common.finish(__file__, {"data": name, "epochs": args.epochs, "target": args.target, "runs": runs}, not args.no_write)


if __name__ == "__main__":
    main()
