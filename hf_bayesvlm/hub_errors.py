"""What the Hub and the network answer, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_TRANSIENT = (408, 429, 500, 502, 503, 504)
_QUOTA_WORDS = ("storage", "quota", "limit reached", "plan to increase", "too large")


class HubError(OSError):
    """The Hub refused, or could not be reached.

    Attributes:
        status: HTTP status of the answer; None if there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: BaseException) -> int | None:
    """HTTP status of the answer that an error is about, if there was one."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment: network loss, or a server in trouble."""
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in _TRANSIENT
    return isinstance(error, HTTPError)


@contextmanager
def explained(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of huggingface_hub while pushing into `HubError`s.

    Args:
        repo_id: Where to is pushed.
        revision: Branch of it.

    Raises:
        HubError: In place of what was raised inside.
    """
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} is no id of a repository: give `user/name`, of letters, digits, '-', '_' and "
            "'.', without the address of the Hub"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(
            f"{repo_id}: offline mode is on; unset HF_HUB_OFFLINE to push to the Hub"
        ) from error
    except (HTTPError, RuntimeError, ValueError) as error:
        # The upload of large files wraps what happened.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (HTTPError, ValueError)):
            raise
        raise HubError(_words(cause, repo_id, revision), status_of(cause)) from error


def _words(error: Exception, repo_id: str, revision: str | None) -> str:
    if not isinstance(error, HfHubHTTPError):
        if not isinstance(error, HTTPError):
            return f"{repo_id}: the Hub does not accept the files: {error}"
        return (
            f"{repo_id}: the connection to the Hub was lost ({type(error).__name__}). Nothing was "
            "published; push again, what is uploaded already will not be uploaded twice"
        )
    status, said = error.response.status_code, error.server_message or ""
    return f"{repo_id}: {_advice(error, status, said.lower(), revision)}" + (
        f" (the Hub says: {said})" if said else ""
    )


def _advice(error: HfHubHTTPError, status: int, said: str, revision: str | None) -> str:
    if status in (402, 413) or (status == 403 and any(word in said for word in _QUOTA_WORDS)):
        return (
            "the Hub has no room for these files: free storage in the settings of the account, or "
            "push to another one. Nothing was published"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"there is no revision {revision!r}; name a branch, or leave revision out for main"
    if status == 401:
        return (
            "the token is not valid, or may not see this repository: log in with `hf auth login`, or "
            "pass token= with the right to write"
        )
    if status == 403:
        return (
            "the token may not write there: use one with the right to write (hf.co/settings/tokens), "
            "push to a namespace of your own, or propose the change with create_pr=True"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such model repository, or the token may not see it"
    if status == 409:
        return "the name is taken, perhaps in another spelling: choose another one"
    if status == 412:
        return "somebody else keeps pushing to it: try again in a moment"
    if status in _TRANSIENT:
        return (
            f"the Hub is in trouble (status {status}). Nothing was published; push again later, what "
            "is uploaded already will not be uploaded twice"
        )
    return f"the Hub refuses with status {status}"
