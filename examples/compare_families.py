"""Five gate families on one task at one target size: LeNet-5-Caffe, the same epochs and the same target of MACs,
several seeds.

Every family gets the same :class:`dampr.Plan` with ``score="learned"``, which ends exactly at the target.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

import dampr
from dampr.cli import demo
from dampr.prune.measure import count_macs
from examples import common

FAMILIES: dict[str, Any] = {
    "hard_concrete": "hard_concrete",
    "dep_l0": "dep_l0",
    "dam": functools.partial(dampr.gates.DiscriminativeMask, min_open=1),
    "diffprune": functools.partial(dampr.gates.DiffPrune, stochastic=True, init_sigma=0.3),
    "diffmask": "diffmask",
}


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
                macs = count_macs(model, data.x[:1])
                found = {"accuracy": common.accuracy(model, data), "open": "", "macs": macs, "macs_dense": macs}
            else:
                # one draw per step for all
                how = {"gate": FAMILIES[family], "score": "learned", "convert": {"per_sample": False}}
                _, found = common.to_budget(model, data, macs=args.target, epochs=args.epochs, **how)
            runs.append({"family": family, "seed": seed, **found, "seconds": time.perf_counter() - start})
            print(
                family,
                seed,
                f"{found['accuracy']:.4f}",
                f"{found['macs'] / found['macs_dense']:.1%}",
                found["open"],
                flush=True,
            )
    common.finish(
        __file__, {"data": name, "epochs": args.epochs, "target": args.target, "runs": runs}, not args.no_write
    )


if __name__ == "__main__":
    main()
