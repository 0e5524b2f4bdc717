"""Publishing files on the Hub: one commit, or nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from ._version import __version__
from .hub_errors import HubError, explained, is_transient, status_of

CARD_NAME = "README.md"
_PAUSES = (1.0, 3.0)
_T = TypeVar("_T")


def push_files(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    commit_message: str,
    card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = True,
    required: Callable[[set[str]], None] | None = None,
    outdated: Callable[[str], bool] | None = None,
) -> CommitInfo:
    """Publish files in a model repository, in one commit.

    The repository and the branch are made if they do not exist.  Where all files are there already, no
    commit is made.  After an error no file has been changed; a repository that was made for the push stays,
    without files.

    Args:
        repo_id: `user/name`; without a user, that of the token.
        files: Path in the repository to a local file or content.
        commit_message: Title of the commit.
        card: Text for `README.md`, where the repository has none; one that is there is not touched.
        private: Make a new repository private (or not, against the default of an organisation).
        token: Hub token, or None for the one of `hf auth login`.
        revision: Branch, made from main if it does not exist.
        create_pr: Open a pull request instead of committing to main.
        exist_ok: Push to a repository that exists.
        required: Called with the paths that the repository has, before anything is changed; raises if
            something would be missing.
        outdated: Tells which files of the repository are removed if they are not among `files`.

    Returns:
        The commit (the last one, if nothing has changed); as a string, its URL.

    Raises:
        HubError: Without a token or the right, where a name or visibility clashes, on a full account, and
            when the Hub or the network fails.
        ValueError: For a pull request to a branch.
    """
    _check_target(repo_id, revision, create_pr)
    api = HfApi(
        token=_checked_token(token), library_name="hf_bayesvlm", library_version=__version__
    )
    with explained(repo_id, revision):
        if "/" not in repo_id:
            repo_id = f"{_patiently(api.whoami)['name']}/{repo_id}"
        found = _look_up(api, repo_id)
        if found is None and required is not None:
            required(set())
        _open_repository(api, repo_id, found, private, exist_ok)
        push = _Push(
            api, repo_id, files, commit_message, card, revision, create_pr, required, outdated
        )
        return push.run()


def _paths_of(info: ModelInfo) -> set[str]:
    """The files of a revision."""
    return {sibling.rfilename for sibling in info.siblings or []}


def _check_target(repo_id: str, revision: str | None, create_pr: bool) -> None:
    if create_pr and revision not in (None, "main"):
        raise ValueError("create_pr proposes a change of main: leave revision out")
    if revision == "":
        raise ValueError("revision is empty: name a branch, or leave it out for main")
    if repo_id.count("/") > 1:
        raise HubError(
            f"{repo_id!r} is no id of a model repository: give `user/name`, without the address of the "
            "Hub, `datasets/` or `spaces/`"
        )


def _checked_token(token: str | bool | None) -> str:
    value = token if isinstance(token, str) else (None if token is False else get_token())
    if not value:
        raise HubError(
            "no Hub token: log in with `hf auth login`, set HF_TOKEN, or pass token= with the right to "
            "write (hf.co/settings/tokens)"
        )
    if not re.fullmatch(r"[!-~]+", value):
        # Refused here, because the HTTP client would show the token in its error.
        raise HubError("the Hub token contains blanks or other characters that no token has")
    return value


def _open_repository(
    api: HfApi, repo_id: str, found: ModelInfo | None, private: bool | None, exist_ok: bool
) -> None:
    if found is None:
        try:
            _patiently(lambda: api.create_repo(repo_id, private=private))
        except HfHubHTTPError as error:
            # Another process, or a first try whose answer was lost, may have made it.
            if status_of(error) != 409:
                raise
            found = _look_up(api, repo_id)
            if found is None:
                raise
    elif not exist_ok:
        raise HubError(
            f"{repo_id} exists already: choose another name, or leave exist_ok=False out"
        )
    if found is not None and private is not None and bool(found.private) != private:
        have, want = ("private", "public") if found.private else ("public", "private")
        raise HubError(
            f"{repo_id} exists and is {have}, not {want}: change that in its settings on the Hub, or "
            "leave private out. Nothing was published"
        )


def _look_up(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo | None:
    """The state of a repository or branch; None where there is none."""
    try:
        return _patiently(lambda: api.model_info(repo_id, revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        if status_of(error) == 404:
            return None
        raise


@dataclass
class _Push:
    api: HfApi
    repo_id: str
    files: Mapping[str, Path | bytes]
    message: str
    card: str | None
    revision: str | None
    create_pr: bool
    required: Callable[[set[str]], None] | None
    outdated: Callable[[str], bool] | None
    made_branch_at: str | None = None

    def run(self) -> CommitInfo:
        """Try until it succeeds or cannot.

        The last request is not repeated as such: its answer may be lost after the commit was made.  A new
        try looks at the repository first, and finds everything there.
        """
        try:
            for pause in _PAUSES:
                try:
                    return self.attempt()
                except HTTPError as error:
                    if self.create_pr or not (is_transient(error) or status_of(error) == 412):
                        raise
                time.sleep(pause)
            return self.attempt()
        except BaseException:
            self.remove_empty_branch()
            raise

    def attempt(self) -> CommitInfo:
        base = _look_up(self.api, self.repo_id, self.revision)
        new_branch = base is None and not (self.revision or "").startswith("refs/")
        if base is None and new_branch:
            base = _look_up(self.api, self.repo_id)
        if base is None or base.sha is None:
            raise HubError(f"{self.repo_id} has no revision {self.revision!r} to push to")
        present = _paths_of(base)
        if self.required is not None:
            self.required(present)
        additions = self.additions(present)
        deletions = [
            CommitOperationDelete(path)
            for path in sorted(present - self.files.keys())
            if self.outdated is not None and self.outdated(path)
        ]
        start = None if new_branch else self.revision
        # Large files first: what comes after the branch is made is short.
        self.api.preupload_lfs_files(
            self.repo_id, additions, revision=start, create_pr=self.create_pr, free_memory=False
        )
        if new_branch and self.revision is not None:
            self.api.create_branch(self.repo_id, branch=self.revision, revision=base.sha)
            self.made_branch_at = base.sha
        return self.api.create_commit(
            self.repo_id,
            [*additions, *deletions],
            commit_message=self.message,
            revision=self.revision,
            create_pr=self.create_pr,
            # What was looked up, such as that there is no card, still holds.
            parent_commit=base.sha,
        )

    def additions(self, present: set[str]) -> list[CommitOperationAdd]:
        contents = dict(self.files)
        if CARD_NAME in present:
            contents.pop(CARD_NAME, None)
        elif self.card is not None:
            contents.setdefault(CARD_NAME, self.card.encode())
        return [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
            for path, content in sorted(contents.items())
        ]

    def remove_empty_branch(self) -> None:
        """Take back a branch that was made for this push and got no commit."""
        if self.made_branch_at is None or self.revision is None:
            return
        try:
            found = self.api.model_info(self.repo_id, revision=self.revision)
            if found.sha == self.made_branch_at:
                self.api.delete_branch(self.repo_id, branch=self.revision)
        except (HTTPError, OSError):
            # The error that led here matters more; a branch without a commit does no harm.
            return


def _patiently(call: Callable[[], _T]) -> _T:
    """Repeat a request that may be repeated while the network or the Hub fails."""
    for pause in _PAUSES:
        try:
            return call()
        except HTTPError as error:
            if not is_transient(error):
                raise
        time.sleep(pause)
    return call()
