"""pytest-benchmark cases of the linear layers on the CPU, run by ``make bench``.

Each group has a gated layer and its competitors.
"""

import pytest
import torch

from benchmarks.suite import SUITE
from dampr.bench import linear

CASES = [case for stage in SUITE["cpu"].values() for case in stage]
PROVIDERS = ("dense", "copy", "dampr", "eager unfused", "compiled unfused", "captum")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shape} {case}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_step(benchmark, case, provider):
    torch.manual_seed(0)
    torch._dynamo.reset()
    providers = linear.providers(case, "cpu", compiled=True)
    if provider not in providers:
        pytest.skip(f"{provider} is no competitor of this case")
    benchmark.group = f"{case.shape}: {case}"
    step = providers[provider]()
    step()
    benchmark(step)
