"""``python -m benchmarks.roofline``: measures the ceilings of this machine with a large copy and a large product of
random matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch

import dampr
from dampr import records
from dampr.bench import timing


def measure() -> dict[str, Any]:
    """The bandwidth of a copy, in bytes read and written per second, and for each dtype the rate of matrix products in
    FLOP per second.
    """
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    count, size = (2**30, 8192) if cuda else (2**26, 2048)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    ceilings: dict[str, Any] = {
        "copy_bytes_per_second": 2 * source.nbytes / _median(lambda: target.copy_(source), cuda)
    }
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = min(_median(way, cuda) for way in _products(a, b))
        ceilings[f"gemm_flops_per_second_{str(dtype).removeprefix('torch.')}"] = 2 * size**3 / best
    return ceilings


def _products(a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """Functions that compute a b^T, one for each library that dampr may take products from on this machine."""
    products = getattr(dampr.ops.select(a.device, a.dtype), "products", None)
    ways: list[Callable[[], torch.Tensor]] = [lambda: a @ b.t()]
    if products is not None and products.by_onednn(len(a), len(b), a.shape[1], a.dtype):
        ways.append(lambda: products.linear(a, b, None, True))
    return ways


def _median(function: Any, cuda: bool) -> float:
    """The seconds of one call of ``function``: the median of three measurements, each the median of 10 rounds.

    So the result is right even if the machine is busy during one of the three measurements.
    """
    return statistics.median(timing.interleaved({"it": function}, rounds=10, cuda=cuda)["it"].median for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write ceilings and environment to this file")
    arguments = parser.parse_args()
    result = {"environment": records.environment(), "ceilings": measure()}
    print(json.dumps(result["ceilings"], indent=1))
    if arguments.json:
        records.write_json(arguments.json, result)


if __name__ == "__main__":
    main()
