"""`bayesvlm push`: publish a saved posterior or bundle on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_common import fail


def push(
    folder: Annotated[
        Path, typer.Argument(help="A saved posterior or bundle.", show_default=False)
    ],
    repo_id: Annotated[
        str, typer.Argument(help="Repository on the Hub, user/name.", show_default=False)
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if it does not exist. \\[default: main]")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
) -> None:
    """Publish a saved posterior or bundle on the Hub, in one commit, and print its address.

    The folder is one that posterior.save_pretrained() or model.save_pretrained() and
    processor.save_pretrained() have written.  The code with which transformers can load a bundle where this
    package is not installed is added to it.  A README.md is published only if the repository has none.
    What is there already is not uploaded again.

    Exit code 2 if that fails; nothing has been published then.
    """
    stderr = Console(stderr=True)
    try:
        info = _push(folder, repo_id, private, create_pr, revision, message)
    except (OSError, ValueError) as error:
        fail(stderr, error)
    typer.echo(info)


def _push(
    folder: Path,
    repo_id: str,
    private: bool,
    create_pr: bool,
    revision: str | None,
    message: str | None,
) -> str:
    from .bundle_hub import check_bundle_folder, push_bundle_folder
    from .posterior_files import POSTERIOR_CONFIG_NAME
    from .posterior_hub import push_posterior_folder

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    options: dict[str, Any] = {
        "private": True if private else None,
        "create_pr": create_pr,
        "revision": revision,
        **({"commit_message": message} if message else {}),
    }
    if (folder / "config.json").exists():
        check_bundle_folder(folder)
        info = push_bundle_folder(folder, repo_id, **options)
    elif (folder / POSTERIOR_CONFIG_NAME).exists():
        info = push_posterior_folder(folder, repo_id, **options)
    else:
        raise ValueError(
            f"{folder} is neither a posterior nor a bundle: it has no {POSTERIOR_CONFIG_NAME} and no "
            "config.json. Give a folder that save_pretrained() has written"
        )
    return info.pr_url or str(info)
