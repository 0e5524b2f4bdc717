"""The `bayesvlm` command."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from ._version import __version__
from .cli_classify import classify
from .cli_demo import demo
from .cli_fit import fit
from .cli_import import import_reference
from .cli_push import push
from .cli_tune import tune

app = typer.Typer(
    name="bayesvlm",
    help="CLIP and SigLIP that say how sure they are.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hf_bayesvlm {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """CLIP and SigLIP that say how sure they are."""


app.command()(classify)
app.command()(fit)
app.command()(tune)
app.command()(import_reference)
app.command()(push)
app.command()(demo)


def main() -> None:
    """Entry point of the `bayesvlm` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal or pipe that cannot show a character gets a question mark, not an error.
        sys.stdout.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
