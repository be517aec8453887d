"""The route through the Triton backend is a function of the problem and of a table of thresholds; it needs no GPU."""

import pytest
import torch

from dampr.kernels.dispatch import Thresholds, thresholds

routes = pytest.importorskip("dampr.ops.backend_triton.routes", reason="needs triton")

BF16 = torch.bfloat16
NEVER = Thresholds("a test", one_pass_gates=0, small_m=0, skip_dead=False)
ALWAYS = Thresholds("a test", one_pass_gates=2**62, small_m=2**62, skip_dead=True)


@pytest.mark.parametrize(
    ("problem", "never", "always"),
    [
        ((1, 64, 64, BF16, "input", True), "passes", "one_pass"),
        ((8192, 4096, 4096, BF16, "output", True), "passes", "one_pass"),
        ((1, 64, 64, BF16, "weight", False), "fold", "small_m"),
        ((8192, 4096, 4096, BF16, (1, 1), False), "fold", "small_m"),
        ((8192, 4096, 4096, BF16, "output", False), "fold", "live"),
        ((64, 64, 64, torch.float32, "weight", False), "fold", "fold"),
        ((64, 64, 64, BF16, (4, 4), False), "fold", "fold"),
    ],
)
def test_the_table_decides_and_the_reason_names_its_source(problem, never, always):
    assert routes.route_by(NEVER, *problem)[0] == never
    name, reason = routes.route_by(ALWAYS, *problem)
    assert name == always
    assert ("[a test]" in reason) == (never != always)


def test_without_a_device_the_default_table_decides():
    problem = (64, 4096, 4096, BF16, "weight", False)
    assert (
        routes.route(*problem) == routes.route(*problem, torch.device("cpu")) == routes.route_by(thresholds(), *problem)
    )


def test_a_device_gets_its_own_table(monkeypatch):
    tables = {"NVIDIA Abacus 1": ALWAYS, "default": NEVER}
    monkeypatch.setattr(routes, "thresholds", tables.__getitem__)
    monkeypatch.setattr(routes.host, "device_name", lambda device: "default" if device is None else "NVIDIA Abacus 1")
    problem = (64, 64, 64, BF16, "input", True)
    assert routes.route(*problem)[0] == "passes"
    assert routes.route(*problem, torch.device("cuda", 0))[0] == "one_pass"
