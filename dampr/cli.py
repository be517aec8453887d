"""The ``dampr`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

import dampr
from dampr import demo as demo_job
from dampr import model_report, prune, report
from dampr.bench import linear, records, verify

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Learned gates that prune networks while they train."
)
console = Console()


@app.command()
def info(json: Annotated[Optional[Path], typer.Option(help="write it to this file")] = None) -> None:  # noqa: UP045
    """Which backends are here, and why one is missing."""
    if json is not None:
        records.write_json(json, {"environment": records.environment(), "backends": dampr.backend_info()})
    for name, state in dampr.backend_info().items():
        console.print(f"{name:10} {state}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits (ships with scikit-learn), fashion-mnist or mnist (idx files)")] = "digits",
    root: Annotated[Optional[Path], typer.Option(help="folder with the idx files")] = None,  # noqa: UP045
    model: Annotated[str, typer.Option(help="mlp (LeNet-300-100) or cnn (LeNet-5-Caffe; idx files only)")] = "mlp",
    epochs: Annotated[Optional[int], typer.Option(help="epochs of each run instead of the recipe's")] = None,  # noqa: UP045
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="folder for demo.json, demo.png, the history and the compacted model")] = Path("dampr-demo"),
) -> None:
    """Train a dense and a gated network, compact the gated one, compare."""
    result = demo_job.run(data, None if root is None else str(root), model=model, epochs=epochs, seed=seed, folder=out)
    report.print_table(console, f"{data}: {demo_job.TITLES[model]}", report.DEMO_COLUMNS, report.demo_rows(result))
    console.print(f"max |gated - compacted| over the test set: {result.max_abs_difference:.2e}", highlight=False)
    records.write_json(out / "demo.json", {"environment": records.environment(), **result.as_dict()})
    written = [str(out / name) for name in ("demo.json", demo_job.HISTORY, demo_job.COMPACTED)]
    try:
        report.plot_demo(result, out / "demo.png")
        written.append(str(out / "demo.png"))
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install 'dampr-torch[plot]')")
    console.print(f"wrote {', '.join(written)}; look at them with", highlight=False, soft_wrap=True)
    console.print(
        f"  dampr report {out / demo_job.COMPACTED} --history {out / demo_job.HISTORY} --html report.html", highlight=False, soft_wrap=True
    )


@app.command("report")
def report_command(
    target: Annotated[str, typer.Argument(help="a file of dampr.save, or module:function that returns (model, example inputs)")],
    json: Annotated[Optional[Path], typer.Option(help="write it to this file as JSON")] = None,  # noqa: UP045
    png: Annotated[Optional[Path], typer.Option(help="draw widths and gates into this file")] = None,  # noqa: UP045
    html: Annotated[Optional[Path], typer.Option(help="write one page with table and chart to this file")] = None,  # noqa: UP045
    history: Annotated[Optional[Path], typer.Option(help="file of a dampr.History: how training went")] = None,  # noqa: UP045
    score: Annotated[Optional[str], typer.Option(help="which number of it is the score; else an accuracy")] = None,  # noqa: UP045
) -> None:
    """Widths, parameters and MACs of a gated model or of a compacted file, before and after; with a history penalty and accuracy too."""
    if score is not None and history is None:
        raise ValueError(f"score={score!r}: expected --history with it")
    training = None if history is None else model_report.trained(history, score)
    found = model_report.look_at(target)
    found.training = training
    report.print_table(console, target, model_report.COLUMNS, found.rows())
    if training is not None:
        report.print_table(console, str(history), *training.table())
    for name, why in found.notes.items():
        console.print(f"{name}: {why}", highlight=False, soft_wrap=True)
    if json is not None:
        records.write_json(json, {"environment": records.environment(), **found.as_dict()})
    if png is not None:
        model_report.plot(found, png)
    if html is not None:
        html.write_text(model_report.as_html(found))


@app.command()
def doctor(
    target: Annotated[str, typer.Argument(help="module:function that returns (gated model, example inputs)")],
    json: Annotated[Optional[Path], typer.Option(help="write the findings to this file")] = None,  # noqa: UP045
) -> None:
    """Why nothing is pruning, or why a layer is about to die; exit code 1 if so. With optimizer and loss: dampr.prune.doctor in Python."""
    findings = prune.doctor(*model_report.made_by(target))
    for finding in findings:
        console.print(str(finding), highlight=False, soft_wrap=True)
    if not findings:
        console.print("nothing found")
    if json is not None:
        records.write_json(json, {"environment": records.environment(), "findings": [finding.as_dict() for finding in findings]})
    raise typer.Exit(1 if findings else 0)


@app.command("verify")
def verify_command(json: Annotated[Optional[Path], typer.Option(help="write the result to this file")] = None) -> None:  # noqa: UP045
    """Hold every op on every backend present here against the float64 reference."""
    rows = verify.run()
    columns = ("op", "backend", "device", "dtype", "cases", "worst error", "its bound", "where", "")
    report.print_table(console, "against the float64 reference", columns, report.verify_rows(rows))
    for row in rows:
        for failure in row.failures[:10]:
            console.print(f"[red]FAILED[/red] {row.op} {row.backend} {row.dtype}: {failure}", soft_wrap=True)
    if json is not None:
        records.write_json(json, {"environment": records.environment(), "rows": [row.as_dict() for row in rows]})
    raise typer.Exit(0 if all(row.ok for row in rows) else 1)


@app.command("bench")
def bench_command(
    json: Annotated[Optional[Path], typer.Option(help="write the points to this file")] = None,  # noqa: UP045
    rounds: Annotated[int, typer.Option(help="interleaved rounds per case")] = 20,
    compiled: Annotated[bool, typer.Option(help="time the torch.compile'd competitor too")] = True,
) -> None:
    """Time gated layers against dense, eager unfused and compiled unfused layers."""
    verified = verify.passes("gated_linear", "weight_gated_linear")
    points = linear.run(compiled=compiled, rounds=rounds)
    header, *rows = linear.table(points, verified)
    report.print_table(console, "GatedLinear, forward + backward", header, rows)
    if not verified:
        console.print("[red]ratios withheld: a linear op fails verification (see dampr verify)[/red]")
    if json is not None:
        records.write_json(json, linear.payload(points, verified))
    raise typer.Exit(0 if verified else 1)


def main() -> None:
    """Entry point: errors that name an argument end the command with one line, not with a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, dampr.FileError, dampr.BackendUnavailableError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
