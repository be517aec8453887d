"""Golden numbers in the Triton kernels, in float32, the precision that they compute in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dampr import ops
from tests.golden_cases import CASES

GOLDEN = json.loads((Path(__file__).parent.parent / "data" / "gates.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_golden_case(name: str) -> None:
    with ops.backend("triton"):
        CASES[name](GOLDEN, torch.float32, 3e-6)
