import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

import dampr

# Whatever dampr tune found here, and whatever other tests find that run at the same time.
_EMPTY = tempfile.TemporaryDirectory(prefix="dampr-tests-")
os.environ["DAMPR_CACHE"] = _EMPTY.name


@pytest.fixture(scope="session")
def golden():
    """The published numbers, in float64 (written by the project's own derivation of the papers' equations)."""
    return json.loads((Path(__file__).parent / "data" / "gates.json").read_text())


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _available(name):
    return not dampr.backend_info()[name].startswith("missing")


@pytest.fixture(params=["reference", "cpp"])
def cpu_backend(request):
    """Every backend that runs CPU tensors, forced for the length of the test (Triton's interpreter has
    tests/interpreter).
    """
    if not _available(request.param):
        pytest.skip(f"{request.param}: {dampr.backend_info()[request.param]}")
    with dampr.backend(request.param):
        yield request.param
