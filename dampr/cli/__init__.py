"""The command ``dampr``, the demo that it trains, and its reports."""


def main() -> None:
    """Run the command; the entry point of the package's console script."""
    from .commands import main as run  # imported here, because the demo and the reports work without typer

    run()
