"""Networks of the coverage benchmark that CI runs, and its page."""

import pytest

from benchmarks.coverage import __main__ as coverage
from benchmarks.coverage import measure, networks

NORMALISED = ("tcn", "discriminator")  # their weights are divided by norms over what they read, so only a layer behind these can be cut


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
