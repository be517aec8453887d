"""Charts come from results files, and from those of verified runs only."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from benchmarks import closing, crossover, plots
from dampr.bench.linear import Case, Point
from dampr.ops.routes import ROUTES

HEAD = {"environment": {"gpu": "NVIDIA Abacus 1", "cpu": "", "threads": 1}, "verified": True}
SHAPE = (64, 32, 16)


def _point(case, provider, seconds, route=None, kept=8):
    return Point(
        str(case),
        case.shape,
        "bfloat16 autocast",
        "cuda",
        provider,
        seconds,
        seconds,
        seconds,
        100,
        route,
        kept_bytes=kept,
    )


def _write(path, points, head=HEAD):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in (head, *(p.as_dict() for p in points))))


@pytest.fixture
def results(tmp_path):
    """A folder of results of a device that does not exist."""
    folder = tmp_path / "results" / "abacus-1"
    sweep = []
    for m in (4, 8, 16):
        case = Case((m, 32, 32), "input")
        sweep += [
            _point(case, "dense", 1.0),
            _point(case, "dampr", 1.1, "fold"),
            _point(case, "dampr", 1.5 - m / 20, "live"),
        ]
    for share in (0.0, 0.9):  # slower than anything in the first panel
        sweep += [
            replace(p, case=crossover.closed_name(case, share), median=p.median * (3 if p.route else 1))
            for p in sweep[-3:]
        ]
    _write(folder / "linear-crossover.jsonl", sweep)
    shut = [(closing.closed_name("linear", share), 1.1 - share) for share in closing.SHARES]
    steps = [
        replace(_point(Case(SHAPE, "input"), who, t), case=name)
        for name, time in shut
        for who, t in (("dense", 1.0), ("dampr", time))
    ]
    _write(folder / "closing.jsonl", steps)
    weight_pass = Case((0, 32, 32), "weight", weight_pass=True)
    _write(
        folder / "linear-pass.jsonl",
        [_point(weight_pass, "copy", 1e-6, kept=None), _point(weight_pass, "dampr", 2e-6, "fold", None)],
    )
    missing = replace(_point(Case(SHAPE, "output"), "captum", float("nan")), error="ImportError: captum")
    for stage, granularity in (("vectors", "output"), ("weights", (4, 4))):
        case = Case(SHAPE, granularity)
        _write(
            folder / f"linear-{stage}.jsonl",
            [_point(case, "dense", 1e-6, kept=0), _point(case, "dampr", 2e-6, "fold"), missing],
        )
    ceilings = {"copy_bytes_per_second": 1e12, "gemm_flops_per_second_bfloat16": 1e12}
    (folder / "roofline.json").write_text(json.dumps({**HEAD, "ceilings": ceilings}))
    return folder.parent


def test_every_chart_is_drawn_from_a_folder_of_results(results, tmp_path):
    written = plots.write_all(results, tmp_path / "plots")
    assert {path.name for path in written} == {f"abacus-1-{name}.png" for name in plots.CHARTS}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert all(source.exists() for path in written for source in plots.sources(path, results))


def test_a_chart_whose_files_are_not_there_is_left_out(results, tmp_path):
    (results / "abacus-1" / "roofline.json").unlink()
    assert {path.name for path in plots.write_all(results, tmp_path)} == {
        f"abacus-1-{name}.png" for name in ("closing", "crossover", "memory")
    }


def test_results_that_failed_verification_are_not_drawn(results, tmp_path):
    _write(results / "abacus-1" / "linear-crossover.jsonl", [], {**HEAD, "verified": False})
    with pytest.raises(ValueError, match=r"linear-crossover\.jsonl: verified=false"):
        plots.write_all(results, tmp_path)


def test_panels_are_titled_and_hold_a_line_for_each_route(results):
    figure = plots.draw_crossover(results / "abacus-1" / "linear-crossover.jsonl")
    rows, closed = figure.axes[:2]
    assert (rows.get_title(), rows.get_xlabel()) == ("per batch, input gates", "rows of x")
    assert (closed.get_title(), closed.get_xlabel()) == (
        "per batch, input gates, 16 rows",
        "blocks of features closed (%)",
    )
    for ax in (rows, closed):
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["dense", "fold", "live"]
    assert list(closed.get_lines()[1].get_xdata()) == [0, 90]
    assert max(max(line.get_ydata()) for ax in (rows, closed) for line in ax.get_lines()) <= rows.get_ylim()[1]
    assert "NVIDIA Abacus 1" in figure.get_suptitle()
    plots.plt.close(figure)


def test_a_line_of_each_provider_falls_with_the_gates(results):
    figure = plots.draw_closing(results / "abacus-1" / "closing.jsonl")
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["dense", "dampr"]
    assert list(ax.get_lines()[1].get_xdata()) == [round(100 * share) for share in closing.SHARES]
    assert list(ax.get_lines()[1].get_ydata()) == pytest.approx([1.1 - share for share in closing.SHARES])
    plots.plt.close(figure)


def test_every_route_has_a_line_style():
    assert set(ROUTES) <= set(plots.STYLES)


def test_shares_count_the_work_that_has_to_be_done():
    ceilings = {"copy_bytes_per_second": 1e9, "gemm_flops_per_second_bfloat16": 1e9}
    m, k, n = SHAPE
    assert plots.attained(_point(Case(SHAPE, "output"), "dampr", 1.0), ceilings) == pytest.approx(6 * m * k * n / 1e9)
    weight_pass = Case((0, k, n), "weight", weight_pass=True)
    assert plots.attained(_point(weight_pass, "dampr", 1.0), ceilings) == pytest.approx(10 * k * n / 1e9)
    assert plots.attained(_point(weight_pass, "copy", 1.0), ceilings) == pytest.approx(6 * k * n / 1e9)


def test_the_committed_charts_are_those_of_the_committed_results(tmp_path):
    drawn = {path.name: "performance.md" for path in plots.write_all(plots.RESULTS, tmp_path)}
    drawn |= {path.name: "methods.md" for path in plots.write_methods(tmp_path)}
    drawn |= {"plan-run.png": "choosing.md", "quality.png": "quality.md", "training-time.png": "training_time.md"}
    committed = sorted(plots.PLOTS.glob("*.png"))
    assert {path.name for path in committed} == set(drawn), "run python -m benchmarks.plots"
    for path in committed:
        assert path.stat().st_size <= 150 * 1024, path.name
        assert f"](plots/{path.name})" in (plots.ROOT / "docs" / drawn[path.name]).read_text()


def test_the_chart_of_a_plan_shows_every_row_and_part() -> None:
    results = plots.RESULTS / "cpu" / "plan-run.json"
    found = json.loads(results.read_text())
    figure = plots.draw_plan(results)
    above, below = figure.axes
    goal, left = above.get_lines()
    assert list(goal.get_ydata()) == [100 * row["macs_goal"] for row in found["rows"]]
    assert list(left.get_ydata()) == [100 * row["macs_left"] for row in found["rows"]]
    assert list(below.get_lines()[0].get_xdata()) == [row["step"] for row in found["rows"]]
    assert [text.get_text() for text in above.texts] == ["dense", "ramp", "fine-tuning"]
    plots.plt.close(figure)


def test_the_charts_of_methods_show_every_family_and_every_run() -> None:
    results = plots.ROOT / "examples" / "results" / "compare_families.json"
    runs = json.loads(results.read_text())["runs"]
    figure = plots.draw_families(results)
    shown = [tuple(point) for ax in figure.axes for points in ax.collections for point in points.get_offsets().tolist()]
    assert sorted(shown) == sorted((r["macs"] / 1e3, 100 * r["accuracy"]) for r in runs)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {r["family"] for r in runs}
    panels = plots.draw_gates().axes
    assert [ax.get_title() for ax in panels] == ["hard_concrete", "dep_l0", "dam", "diffprune", "diffmask"]
    assert all(len(ax.lines) == 1 and ax.get_xlabel() for ax in panels)
    plots.plt.close("all")
