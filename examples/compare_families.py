"""Five gate families on one task at one target size: LeNet-5-Caffe, the same epochs and the same target of expected MACs, several seeds.

Every family gets the same penalty, a constant times its expected share of MACs, until what is open is down at the target; from then on its
gates stay as they are.
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


STRENGTH = 2.0  # what having all MACs costs beside the cross-entropy


def above(macs: list[tuple[nn.Module, int]], target: float) -> Tensor:
    """The penalty: the expected share of MACs, for as long as the gates that evaluation leaves open take more than the target."""
    total, left, before = sum(count for _, count in macs), 0.0, 1.0
    for layer, count in macs:
        after = float(layer.gate.is_open().float().mean()) if isinstance(layer, dampr.nn.GatedLayer) else 1.0
        left, before = left + count * before * after, after
    if left > target * total:
        return STRENGTH * demo.expected_macs(macs) / total
    for layer, _ in macs:
        for parameter in layer.gate.parameters() if isinstance(layer, dampr.nn.GatedLayer) else ():
            parameter.requires_grad_(False)
    return torch.zeros(())


def main() -> None:
    args = common.arguments(__doc__, epochs=6, count=8000, seeds=3, target=0.25)
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
                macs = demo.layer_macs(model, data.x[:1])
                rate = 2e-2 if family == "dep_l0" else 1e-1
                common.train(
                    model, data, epochs=args.epochs, lr=2e-3, penalty=lambda _, macs=macs: above(macs, args.target), gate_lr=rate, settle=2
                )
                found = common.compacted(model, data)
            runs.append({"family": family, "seed": seed, "seconds": time.perf_counter() - start, **found})
            print(family, seed, f"{found['accuracy']:.4f}", f"{found['macs'] / found['macs_dense']:.1%}", found["open"], flush=True)
    common.finish(__file__, {"data": name, "epochs": args.epochs, "target": args.target, "runs": runs}, not args.no_write)


if __name__ == "__main__":
    main()
