"""The command ``dampr``: its commands, the demo that it trains, and its reports."""


def main() -> None:
    """What the command runs."""
    from .commands import main as run  # not before it is asked for: the demo and the reports do without typer

    run()
