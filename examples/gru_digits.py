"""A GRU that reads images row by row, pruned to half its units by a plan,
against dense and against narrow from scratch.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from dampr.prune.measure import count_macs
from examples import common

HIDDEN = 96


class RowReader(nn.Module):
    """Flattened square images, (batch, pixels), as sequences of rows; the last state decides."""

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        self.side, self.gru, self.head = side, nn.GRU(side, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(x.unflatten(1, (self.side, self.side)))[0][:, -1])
        return y


def main() -> None:
    args = common.arguments(__doc__, epochs=16, count=12000)
    name, data = common.images(args.root, args.count)
    side, start = round(data.x.shape[1] ** 0.5), time.perf_counter()
    models: dict[str, nn.Module] = {}
    for kind, hidden in (("dense", HIDDEN), ("narrow", HIDDEN // 2)):
        torch.manual_seed(args.seed)
        models[kind] = RowReader(side, hidden)
        common.train(models[kind], data, epochs=args.epochs, lr=2e-3)
    torch.manual_seed(args.seed)
    half = count_macs(models["narrow"], data.x_test[: common.EXAMPLES])
    models["pruned"], _ = common.to_budget(RowReader(side, HIDDEN), data, macs=half, epochs=args.epochs)

    seconds = time.perf_counter() - start
    rows = common.side_by_side(
        models, data.x_test[:64], {kind: common.accuracy(model, data) for kind, model in models.items()}
    )
    result = {
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": seconds,
        "metric": "accuracy",
        "models": rows,
    }
    common.finish(__file__, {**result, "published": "recurrent nodes: tables not available"}, not args.no_write)


if __name__ == "__main__":
    main()
