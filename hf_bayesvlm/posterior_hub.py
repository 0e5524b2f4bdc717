"""Sharing a posterior on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, ModelCardData

from .hub_push import push_files
from .posterior_files import (
    POSTERIOR_CONFIG_NAME,
    POSTERIOR_WEIGHTS_NAME,
    PosteriorError,
    hub_id,
    read_posterior_files,
)


class PosteriorHub:
    """Mix-in of `BayesVLMPosterior`: publishing it."""

    def to_config(self) -> dict[str, Any]:
        """As `BayesVLMPosterior.to_config`."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """As `BayesVLMPosterior.save_pretrained`."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload posterior",
        subfolder: str | None = None,
        exist_ok: bool = True,
    ) -> CommitInfo:
        """Publish the posterior in a model repository on the Hub, in one commit.

        Written are `posterior.safetensors`, `posterior_config.json` and, if the repository has no card, a
        `README.md`.  If all that is there already, no commit is made.

        Args:
            repo_id: `user/name`; made if it does not exist.
            private: Make a new repository private.
            token: Hub token, or None for the one of `hf auth login`.
            revision: Branch to commit to, made if it does not exist.
            create_pr: Open a pull request instead of committing.
            commit_message: Title of the commit.
            subfolder: Folder of the repository for the two files.
            exist_ok: Push to a repository that exists.

        Returns:
            The commit; as a string, its URL.

        Raises:
            HubError: Without a token or the right, on a full account, when names or visibility clash, and
                when the Hub or the network fails.  Nothing has been published then.
            PosteriorError: If its `base_model` is a folder of this machine.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_posterior_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                subfolder=subfolder,
                exist_ok=exist_ok,
            )


def push_posterior_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    subfolder: str | None = None,
    commit_message: str = "Upload posterior",
    **options: Any,
) -> CommitInfo:
    """Publish the two files of a saved posterior, and its `README.md` if it has one.

    Args:
        folder: As written by `BayesVLMPosterior.save_pretrained`.
        repo_id: `user/name`.
        subfolder: Folder of the repository for the two files.
        commit_message: Title of the commit.
        **options: Further options of `push_to_hub`.

    Returns:
        The commit.

    Raises:
        FileNotFoundError: If a file is missing.
        PosteriorError: If the files are damaged, or name a folder of this machine as their base.
        HubError: As `push_to_hub`.
    """
    source = Path(folder)
    config, _ = read_posterior_files(source, {"subfolder": None})
    _check_shareable(config)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    files: dict[str, Path | bytes] = {
        f"{prefix}{name}": source / name for name in (POSTERIOR_CONFIG_NAME, POSTERIOR_WEIGHTS_NAME)
    }
    card = source / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else posterior_card(config)
    return push_files(repo_id, files, card=text, commit_message=commit_message, **options)


def posterior_card(config: dict[str, Any]) -> str:
    """A minimal card for a posterior.

    Args:
        config: Its `posterior_config.json`.

    Returns:
        Text of a `README.md`.
    """
    base = hub_id(config.get("base_model"))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        base_model=base,
        tags=["bayesvlm", "uncertainty", "laplace"],
    )
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Laplace posterior{f' of {base}' if base else ''}\n\n"
        "Uncertainty for a vision-language model after [arXiv:2412.06014]"
        "(https://arxiv.org/abs/2412.06014), for use with `hf_bayesvlm`.\n"
    )


def _check_shareable(config: dict[str, Any]) -> None:
    base = str(config.get("base_model") or "")
    if Path(base).is_absolute() or base.startswith((".", "~")) or "\\" in base:
        raise PosteriorError(
            "the posterior names a folder of this machine as its base_model, where nobody else finds it: "
            "give the base's Hub id with dataclasses.replace(posterior, base_model='user/name')"
        )
