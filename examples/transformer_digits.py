"""A small transformer that reads images row by row; a plan prunes heads and feed-forward neurons to half its
multiply-accumulates.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from examples import common

WIDTH, HEADS, NEURONS, LAYERS = 64, 4, 256, 2


class RowTransformer(nn.Module):
    """Flattened square images, (batch, pixels), as sequences of rows; the mean of the last layer decides."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.rows, self.position = side, nn.Linear(side, WIDTH), nn.Parameter(torch.randn(side, WIDTH) / 10)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, NEURONS, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(self.rows(x.unflatten(1, (self.side, self.side))) + self.position).mean(1))
        return y


def main() -> None:
    args = common.arguments(__doc__, epochs=8, count=8000, macs=0.5)
    name, data = common.images(args.root, args.count)
    side, start = round(data.x.shape[1] ** 0.5), time.perf_counter()
    torch.manual_seed(args.seed)
    models: dict[str, nn.Module] = {"dense": RowTransformer(side)}
    common.train(models["dense"], data, epochs=args.epochs, lr=1e-3)
    torch.manual_seed(args.seed)
    models["pruned"], found = common.to_budget(RowTransformer(side), data, macs=args.macs, epochs=args.epochs, lr=1e-3)

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
        "open": found["open"],
    }
    common.finish(
        __file__, {**result, "models": rows, "published": "none: no paper of the five prunes heads"}, not args.no_write
    )


if __name__ == "__main__":
    main()
