"""Networks of the coverage benchmark that CI runs, and its page."""

import pytest
import torch

import dampr
from benchmarks.coverage import __main__ as coverage
from benchmarks.coverage import measure, networks
from dampr.prune import inputs
from dampr.prune.cost import Cost
from dampr.prune.measure import count_macs

# their weights are divided by norms over what they read, so only a layer behind these can be cut
NORMALISED = ("tcn", "discriminator")


@pytest.mark.parametrize(("library", "name"), networks.CI)
def test_a_network_is_pruned_exactly_as_foretold(library, name, monkeypatch):
    monkeypatch.setattr(measure, "torch_pruning_left", lambda model, x: "not measured")
    row = measure.row(library, name)
    assert "error" not in row
    assert row["same_after_convert"] == "bits"
    assert row["left"] == row["foretold"]
    assert row["float32"] < 1e-5
    assert row["float64"] < 1e-12
    assert row["prunable"] > (0.03 if name in NORMALISED else measure.SHARE)


def test_the_page_shows_the_results_and_nothing_else():
    assert coverage.PAGE.read_text() == coverage.page()


def test_no_result_is_wrong():
    rows = [row for row in coverage.results().values() if "error" not in row]
    assert rows
    for row in rows:
        assert row["float64"] < 1e-9, row["name"]
        assert row["left"] == row["foretold"], row["name"]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "swin", "segformer"])
def test_widths_that_lose_different_shares_are_right_too(name: str, residual: bool) -> None:
    """Of half of everything a number that follows the wrong width becomes the same."""
    pytest.importorskip("transformers")
    model, x = networks.build("transformers", name)
    own = {n: v for n, m in model.named_modules() for key, v in vars(m).items() if key == "sequence_reduction_ratio"}
    dampr.convert(model, example_inputs=x, residual=residual)
    cost, generator = Cost(model, x, "macs"), torch.Generator().manual_seed(1)
    for gate in cost.structure.gates:
        left = 1 + int(torch.randint(gate.num_gates, (), generator=generator))
        keep = torch.randperm(gate.num_gates, generator=generator) < left
        gate.set_levels_(torch.where(keep, gate.levels(), -3.0))
    small = dampr.compact(model, example_inputs=x)
    assert count_macs(small, x) == int(cost(cost.decision()))
    a, b = inputs.evaluate(model, x), inputs.evaluate(small, x)
    assert inputs.gap(a, b) < 1e-5 * inputs.size(a)
    assert own == {
        n: v for n, m in small.named_modules() for key, v in vars(m).items() if key == "sequence_reduction_ratio"
    }
