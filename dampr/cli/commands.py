"""The ``dampr`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

import dampr
from dampr import prune, records
from dampr.bench import linear, tune
from dampr.cli import demo as demo_job
from dampr.cli import model_report, report
from dampr.ops import thresholds
from dampr.testing import verify

HELP = """Learned gates that prune networks while they train.

In Python: dampr.Plan prunes a model while it trains and ends with a smaller plain one; dampr.convert, dampr.Budget and
dampr.compact are its parts. The commands try that on real data, look at models, and check and time this
machine. Start with dampr demo.

Each takes --json FILE; docs/commands.md in the repository says what is in it.
Exit codes: 0, 1 when a check fails, 2 for wrong arguments.
"""
NO_PLOT = "matplotlib is not installed (pip install 'dampr-torch[plot]')"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # fills the lines of paragraphs
    help=HELP,
)
console = Console()

# typer reads Optional, on every Python
File = Optional[Path]  # noqa: UP045
Count = Optional[int]  # noqa: UP045
Name = Optional[str]  # noqa: UP045
Json = Annotated[File, typer.Option("--json", metavar="FILE", help="write the result to FILE as JSON")]


def _version(wanted: bool) -> None:
    if wanted:
        console.print(dampr.__version__, highlight=False)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")]


@app.callback()
def options(version: Version = False) -> None:
    pass  # the callback of the option has done it


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(metavar="NAME", help="digits (with scikit-learn), fashion-mnist or mnist (idx files)")
    ] = "digits",
    root: Annotated[File, typer.Option(metavar="FOLDER", help="where the idx files are")] = None,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="mlp (LeNet-300-100) or cnn (LeNet-5-Caffe; idx files only)")
    ] = "mlp",
    epochs: Annotated[Count, typer.Option(help="how many to train each network for; by default the recipe's")] = None,
    seed: Annotated[int, typer.Option(help="of initialisation and batches")] = 0,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="for all that is written")] = Path("dampr-demo"),
    json: Annotated[
        File, typer.Option("--json", metavar="FILE", help="write the result there instead of to demo.json")
    ] = None,
) -> None:
    """Train a network dense, and with a plan that prunes it; compare both.

    Writes demo.json, demo.png, history.jsonl and compacted.safetensors, and says how to look at the last two with dampr
    report.
    """
    result = demo_job.run(data, None if root is None else str(root), model=model, epochs=epochs, seed=seed, folder=out)
    report.print_table(console, f"{data}: {demo_job.TITLES[model]}", report.DEMO_COLUMNS, report.demo_rows(result))
    console.print(f"max |masked - compacted| over 256 test images: {result.max_abs_difference:.2e}", highlight=False)
    json = json or out / "demo.json"
    records.write_json(json, {"environment": records.environment(), **result.as_dict()})
    written = [str(json), *(str(out / name) for name in (demo_job.HISTORY, demo_job.COMPACTED))]
    try:
        report.plot_demo(result, out / "demo.png")
        written.append(str(out / "demo.png"))
    except ImportError:
        console.print(f"no plot: {NO_PLOT}")
    console.print(f"wrote {', '.join(written)}; look at them with", highlight=False, soft_wrap=True)
    command = f"dampr report {out / demo_job.COMPACTED} --history {out / demo_job.HISTORY} --html report.html"
    console.print(f"  {command}", highlight=False, soft_wrap=True)


@app.command("report")
def report_command(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="a file of dampr.save, or module:function")],
    json: Json = None,
    png: Annotated[File, typer.Option(metavar="FILE", help="draw charts into FILE")] = None,
    html: Annotated[File, typer.Option(metavar="FILE", help="write one page with tables and charts to FILE")] = None,
    history: Annotated[
        File, typer.Option(metavar="FILE", help="what a dampr.History wrote: show how training went too")
    ] = None,
    score: Annotated[Name, typer.Option(metavar="NAME", help="the number of the history to show as the score")] = None,
) -> None:
    """Show how wide a model is before and after compaction, and how its training went.

    TARGET is a file that dampr.save wrote, or module:function, which is imported from the working directory and returns
    (gated model, example inputs). Shown are widths, parameters and MACs, of a gated model a histogram of its gates;
    with a history penalty and score over the steps, and score against the MACs that are left. The score is an accuracy
    unless --score names another number.
    """
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
    for file in filter(None, (png, html)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if png is not None:
        try:
            model_report.plot(found, png)
        except ImportError:
            raise ImportError(f"png={str(png)!r}: {NO_PLOT}") from None
    if html is not None:
        html.write_text(model_report.as_html(found))


@app.command()
def doctor(
    target: Annotated[str, typer.Argument(metavar="MODULE:FUNCTION", help="returns (gated model, example inputs)")],
    json: Json = None,
) -> None:
    """Find out why nothing is pruning, or why a layer is about to die.

    Prints what is wrong and what to do; exit code 1 if there is anything. MODULE is imported from the working
    directory. In Python dampr.prune.doctor looks at your optimizer, loss and penalty too.
    """
    findings = prune.doctor(*model_report.made_by(target))
    for finding in findings:
        console.print(str(finding), highlight=False, soft_wrap=True)
    if not findings:
        console.print("nothing found")
    if json is not None:
        records.write_json(
            json, {"environment": records.environment(), "findings": [finding.as_dict() for finding in findings]}
        )
    raise typer.Exit(1 if findings else 0)


@app.command("verify")
def verify_command(json: Json = None) -> None:
    """Hold every kernel that runs on this machine against the float64 reference.

    Values, gradients, noise, and which gates are 0 or 1, on hard shapes, for each op, backend and dtype; a minute or
    two. Exit code 1 if one is off by more than its bound.
    """
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
    json: Json = None,
    rounds: Annotated[int, typer.Option(help="how often each competitor takes its turn")] = 20,
    compiled: Annotated[
        bool, typer.Option(help="time gates by hand under torch.compile too, which takes longest")
    ] = True,
) -> None:
    """Time gated layers on this machine, against dense ones and against gates by hand.

    A step is forward and backward; competitors take turns and medians are compared. The linear ops are verified first:
    where they fail no ratio is printed, and the exit code is 1.
    """
    verified = verify.passes("gated_linear", "weight_gated_linear")
    points = linear.run(compiled=compiled, rounds=rounds)
    header, *rows = linear.table(points, verified)
    report.print_table(console, "GatedLinear, forward + backward", header, rows)
    if not verified:
        console.print("[red]ratios withheld: a linear op fails verification (see dampr verify)[/red]")
    if json is not None:
        records.write_json(json, linear.payload(points, verified))
    raise typer.Exit(0 if verified else 1)


@app.command("tune")
def tune_command(json: Json = None) -> None:
    """Measure from which share of closed gates on this CPU gains by leaving them out.

    With this number of threads, in some seconds. What it finds is kept in the user's cache folder and holds from then
    on; without it the thresholds are safe ones.
    """
    if dampr.backend_info()["cpp"].startswith("missing"):
        raise dampr.BackendUnavailableError(
            f"cpp {dampr.backend_info()['cpp']}; expected the extension, whose routes are tuned"
        )
    timings = tune.run()
    columns = ("gates of", "closed", "time, of not leaving out")
    report.print_table(
        console, "closed gates left out", columns, [(t.side, f"{t.closed:.1%}", f"{t.ratio:.2f}") for t in timings]
    )
    found = tune.keep(timings)
    console.print(f"left out {thresholds.described(found)}: {thresholds.path()}", highlight=False, soft_wrap=True)
    if json is not None:
        rows = [t._asdict() for t in timings]
        records.write_json(json, {"environment": records.environment(), "timings": rows, "thresholds": found._asdict()})


@app.command()
def info(json: Json = None) -> None:
    """Say which backends are here, why one is missing, and what dampr tune has found."""
    skip = thresholds.skip()
    if json is not None:
        content = {"environment": records.environment(), "backends": dampr.backend_info(), "thresholds": skip._asdict()}
        records.write_json(json, content)
    for name, state in dampr.backend_info().items():
        console.print(f"{name:10} {state}", highlight=False, soft_wrap=True)
    console.print(f"{'skip':10} {thresholds.described(skip)}", highlight=False, soft_wrap=True)


CLEAR = (
    *(ValueError, TypeError, OSError, ImportError, dampr.BackendUnavailableError),
    *(dampr.FileError, dampr.ConversionError, dampr.BudgetError, dampr.CompactionError),
)


def main() -> None:
    """Entry point: errors that say what is wrong end the command with one line, not with a traceback."""
    try:
        app()
    except CLEAR as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
