"""An image auto-encoder with a DAM bottleneck: 784-128-64-32-50 (gates) -32-64-128-784 (Bu et al. 2021, MNIST; tables
not available).

A larger lambda leaves a smaller code. One network per lambda; ``--root`` takes MNIST.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor, nn

import dampr
from examples import common


def layers(*sizes: int) -> list[nn.Module]:
    return [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]


class AutoEncoder(nn.Module):
    def __init__(self, pixels: int, code: int = 50) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*layers(pixels, 128, 64, 32), nn.Linear(32, code))
        self.gate = dampr.gates.DiscriminativeMask(code)
        self.decoder = nn.Sequential(*layers(code, 32, 64, 128), nn.Linear(128, pixels), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x) * self.gate())
        return y


def run(x: Tensor, x_test: Tensor, lam: float, epochs: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model, start = AutoEncoder(x.shape[1]), time.perf_counter()
    # a short run: beta moves faster than published
    optimizer = torch.optim.Adam(dampr.param_groups(model, lr=1e-3, gate_lr=2e-2))
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(512):
            loss = (model(x[index]) - x[index]).square().mean() + dampr.gates.dam_penalty([model.gate], lam)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        error = float((model(x_test) - x_test).square().mean())
    found = int(model.gate.is_open().sum())
    print(f"lambda {lam:5}  open codes {found:2} of 50  test error {error:.4f}", flush=True)
    return {"lam": lam, "open": found, "error": error, "seconds": time.perf_counter() - start}


def main() -> None:
    args = common.arguments(__doc__, epochs=12, count=20000)
    name, data = common.images(args.root, args.count)
    x, x_test = data.x * 2 - 1, data.x_test * 2 - 1
    runs = [run(x, x_test, lam, args.epochs, args.seed) for lam in (0.0, 0.003, 0.01, 0.03)]
    result = {
        "method": "dam",
        "data": name,
        "seed": args.seed,
        "epochs": args.epochs,
        "runs": runs,
        "published": "tables not available",
    }
    common.finish(__file__, result, not args.no_write)


if __name__ == "__main__":
    main()
