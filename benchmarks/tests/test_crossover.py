"""The crossover sweep runs every route that can serve a case, and the thresholds follow from its points."""

import json

import pytest
import torch

import dampr
from benchmarks import crossover, run
from dampr.bench.linear import Case, Point
from dampr.kernels import configs, dispatch
from dampr.testing import verify
from tests.backends import needs_cpp


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(crossover.SIZE, "cpu", 16)
    monkeypatch.setitem(crossover.ROWS, "cpu", [4, 32])


@needs_cpp
def test_every_route_that_can_serve_a_case_is_timed_next_to_dense(small):
    points = crossover.run("cpu", rounds=2)
    found = {}
    for p in points:
        found.setdefault((p.case, p.shape[0]), []).append(p.route)
    assert {rows for _, rows in found} == {4, 32}
    for (case, _), routes in found.items():
        assert routes[0] is None
        assert "small" not in routes
        expected = {"fold", "activations"} if case in ("per batch, output gates", "per batch, input gates") else set()
        assert len(routes) > 1
        assert expected <= set(routes)
    assert {p.provider for p in points} == {"dense", "dampr"}
    assert all(p.median > 0 and p.kept_bytes is not None for p in points)


def test_the_reference_has_no_routes_to_compare():
    with dampr.backend("reference"):
        assert crossover.routes_of(Case((4, 8, 8), "output"), "cpu") == []


@needs_cpp
def test_the_stage_writes_its_points(small, monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "passes", lambda *ops: True)
    assert run.main(["crossover", "--rounds", "2", "--out", str(tmp_path)]) == 0
    head, *points = map(json.loads, (tmp_path / "linear-crossover.jsonl").read_text().splitlines())
    assert head["verified"]
    assert {p["route"] for p in points} >= {None, "fold"}
    assert len(list(tmp_path.iterdir())) == (2 if torch.cuda.is_available() else 1)


@pytest.mark.parametrize("share", crossover.SHARES)
def test_whole_blocks_are_closed(share):
    log_alpha = torch.zeros(4096)
    crossover.close_blocks(log_alpha, share)
    closed = (log_alpha == crossover.CLOSED).view(-1, crossover.CLOSED_BLOCK)
    assert (closed.all(1) == closed.any(1)).all()
    assert int(closed.all(1).sum()) == round(share * 32)


def _sweep(faster):
    """Points of every case over 4 to 64 rows: ``faster`` gives, by route,
    up to how many rows it takes half of the time of the others.
    """
    points = []
    pairs = [("live", "fold"), ("live", "fold"), ("one_pass", "passes"), ("one_pass", "passes"), ("small_m", "fold")]
    for how, routes in zip((*crossover.PER_BATCH, *crossover.PER_SAMPLE, crossover.WEIGHT), pairs, strict=True):
        for m in (4, 8, 16, 32, 64):
            case = Case((m, 256, 256), *how)
            seconds = {
                None: 1.0,
                **{
                    route: 1.0 if route in ("fold", "passes") else 0.5 if m <= faster[route] else 1.5
                    for route in routes
                },
            }
            points += [
                Point(str(case), case.shape, "", "cuda", "dampr" if r else "dense", t, t, t, None, r)
                for r, t in seconds.items()
            ]
    return points


def test_thresholds_are_where_routes_cross():
    table = crossover.tuned(_sweep({"one_pass": 8, "small_m": 32, "live": 64}), "a test")
    assert table == dispatch.Thresholds("a test", configs.one_pass_gates(8, 256, 256), 32, True)
    never = crossover.tuned(_sweep({"one_pass": 0, "small_m": 0, "live": 32}), "a test")
    assert never == dispatch.Thresholds("a test", 0, 0, False)


def test_points_with_closed_blocks_do_not_move_thresholds():
    points = _sweep({"one_pass": 8, "small_m": 32, "live": 0})
    case = Case((64, 256, 256), "input")
    slow = [
        Point(crossover.closed_name(case, 0.9), case.shape, "", "cuda", "dampr", t, t, t, None, r)
        for r, t in (("live", 0.1), ("fold", 9.0))
    ]
    assert crossover.tuned([*points, *slow], "a test") == crossover.tuned(points, "a test")


def test_one_noisy_point_moves_no_threshold():
    sweep = {4: (1.1, 1.0), 8: (0.5, 1.0), 16: (0.5, 1.0), 32: (2.0, 1.0)}
    assert crossover.best_limit([sweep]) == 16


def test_a_tuned_table_can_be_read_back(tmp_path):
    table = crossover.tuned(_sweep({"one_pass": 8, "small_m": 32, "live": 64}), "a test")
    (tmp_path / "h200.json").write_text(json.dumps(table._asdict()))
    assert dispatch.read(tmp_path / "h200.json") == table
