"""The `bayesvlm` command as a whole."""

from __future__ import annotations

from typer.testing import CliRunner

from hf_bayesvlm import __version__
from hf_bayesvlm.cli import app

runner = CliRunner()


def test_every_subcommand_is_listed_with_what_it_does() -> None:
    output = runner.invoke(app, ["--help"], terminal_width=200, color=False).output
    for name in ("classify", "fit", "tune", "import-reference", "push", "demo"):
        assert name in output


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output.strip() == f"hf_bayesvlm {__version__}"
