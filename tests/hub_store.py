"""What a Hub knows, in memory: users, repositories, commits, branches, tags, large files.

`hub_server.py` puts it behind HTTP.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

WRITE_TOKEN = "hf_double_write_of_alice"
READ_TOKEN = "hf_double_read_of_alice"
OTHER_TOKEN = "hf_double_write_of_bob"
LARGE = 10 * 2**20
LARGE_ENDINGS = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".parquet",
    ".arrow",
    ".tar",
    ".zip",
    ".gz",
    ".png",
    ".jpg",
    ".jpeg",
    ".npz",
    ".pkl",
    ".onnx",
]
GITATTRIBUTES = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE_ENDINGS)
_EPOCH = datetime(2025, 1, 1, tzinfo=timezone.utc)

Content = bytes | str | Path


class HubError(Exception):
    """An answer that is no success: status, code of the Hub, message."""

    def __init__(self, status: int, code: str | None, message: str, **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body


@dataclass(frozen=True)
class User:
    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()

    @property
    def oid(self) -> str:
        data = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    id: str
    type: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    pull_requests: int = 0

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"


class HubStore:
    """Repositories and users; every change is one atomic step under a lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users = {
            WRITE_TOKEN: User("alice", orgs=("lab",)),
            READ_TOKEN: User("alice", role="read", orgs=("lab",)),
            OTHER_TOKEN: User("bob"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.objects: dict[str, bytes] = {}
        self.quota: int | None = None
        self._clock = itertools.count(1)

    # ------------------------------------------------------------------ rights

    def may_write(self, repo_owner: str, user: User | None) -> bool:
        if user is None or user.role != "write":
            return False
        return repo_owner == user.name or repo_owner in user.orgs

    def readable(self, kind: str, repo_id: str, user: User | None) -> Repo:
        """The repository, as far as this user may know of it; a gated one is known but not read."""
        repo = self.repos.get((kind, repo_id))
        insider = (
            repo is not None
            and user is not None
            and (repo.owner == user.name or repo.owner in user.orgs)
        )
        if repo is None or (repo.private and not insider):
            if user is None:
                raise HubError(401, "RepoNotFound", "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    def open_files(self, repo: Repo, user: User | None) -> None:
        if not repo.gated or (
            user is not None and (repo.owner == user.name or repo.owner in user.orgs)
        ):
            return
        message = f"Access to {repo.type} {repo.id} is restricted. Ask for access on its page."
        raise HubError(401 if user is None else 403, "GatedRepo", message)

    def writable(self, kind: str, repo_id: str, user: User | None, *, pr: bool = False) -> Repo:
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        repo = self.readable(kind, repo_id, user)
        if user.role != "write":
            raise HubError(
                403, None, "Forbidden: you must use a write token to upload to a repository."
            )
        if not pr and not self.may_write(repo.owner, user):
            raise HubError(
                403,
                None,
                "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request",
            )
        return repo

    # ------------------------------------------------------------------ repositories

    def create(
        self,
        repo_id: str,
        kind: str = "model",
        *,
        private: bool = False,
        gated: bool = False,
        sdk: str | None = None,
        author: str = "alice",
    ) -> Repo:
        """A repository with the first commit that the Hub makes."""
        with self.lock:
            for other_kind, other in self.repos:
                if other_kind == kind and other.lower() == repo_id.lower():
                    raise HubError(
                        409, None, f"You already created this {kind} repo", repo_id=other
                    )
            repo = Repo(repo_id, kind, private=private, gated=gated, sdk=sdk)
            self.repos[kind, repo_id] = repo
            first = {".gitattributes": Blob(GITATTRIBUTES.encode(), lfs=False)}
            self._append(repo, "refs/heads/main", first, "initial commit", "", author)
            return repo

    def resolve(self, repo: Repo, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in repo.refs:
                return repo.commits[repo.refs[ref]]
        found = [sha for sha in repo.commits if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) == 1:
            return repo.commits[found[0]]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def log(self, repo: Repo, revision: str = "main") -> list[Commit]:
        """Commits of a revision, the last one first."""
        found: list[Commit] = []
        sha: str | None = self.resolve(repo, revision).sha
        while sha is not None:
            found.append(repo.commits[sha])
            sha = found[-1].parent
        return found

    def commit(
        self,
        repo: Repo,
        revision: str,
        changes: Mapping[str, Blob | None],
        title: str,
        description: str = "",
        *,
        author: str = "alice",
        parent: str | None = None,
        create_pr: bool = False,
    ) -> tuple[Commit, int | None]:
        """One commit; None deletes. Returns it and the number of the pull request that it opened."""
        with self.lock:
            head = self.resolve(repo, revision)
            if parent is not None and parent != head.sha:
                raise HubError(412, None, "A commit has happened since. Please refresh and try.")
            number = None
            if create_pr:
                repo.pull_requests += 1
                number = repo.pull_requests
                ref = f"refs/pr/{number}"
                repo.refs[ref] = head.sha
            else:
                ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
                if ref not in repo.refs:
                    raise HubError(404, "RevisionNotFound", f"No branch {revision}")
            files = dict(head.files)
            for path, blob in changes.items():
                if blob is None:
                    if path not in files:
                        raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
                    del files[path]
                else:
                    files[path] = blob
            return self._append(repo, ref, files, title, description, author), number

    def _append(
        self, repo: Repo, ref: str, files: dict[str, Blob], title: str, text: str, author: str
    ) -> Commit:
        parent = repo.refs.get(ref)
        number = next(self._clock)
        date = (_EPOCH + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        content = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        stamp = f"{number} {repo.type} {repo.id} {parent} {title}\n{content}"
        sha = hashlib.sha1(stamp.encode()).hexdigest()
        repo.commits[sha] = Commit(sha, parent, title, text, author, date, files)
        repo.refs[ref] = sha
        for blob in files.values():
            if blob.lfs:
                self.objects[blob.sha256] = blob.data
                repo.large.add(blob.sha256)
        return repo.commits[sha]

    # ------------------------------------------------------------------ for tests

    def put(
        self,
        repo_id: str,
        files: Mapping[str, Content] | Path,
        kind: str = "model",
        *,
        revision: str = "main",
        title: str = "Upload files",
        **values: Any,
    ) -> Commit:
        """Commit files (or the whole of a folder) directly; the repository is made if needed."""
        with self.lock:
            if (kind, repo_id) not in self.repos:
                self.create(repo_id, kind, **values)
            repo = self.repos[kind, repo_id]
            if isinstance(files, Path):
                root = files
                files = {
                    file.relative_to(root).as_posix(): file
                    for file in sorted(root.rglob("*"))
                    if file.is_file()
                }
            branch = f"refs/heads/{revision}"
            if not revision.startswith("refs/") and branch not in repo.refs:
                repo.refs[branch] = repo.refs["refs/heads/main"]
            blobs = {path: as_blob(path, content) for path, content in files.items()}
            return self.commit(repo, revision, blobs, title)[0]

    def state(self) -> dict[str, Any]:
        """All that is public: compare before and after to see that nothing was changed."""
        with self.lock:
            return {
                f"{kind}s/{repo_id}": (dict(repo.refs), repo.private, repo.pull_requests)
                for (kind, repo_id), repo in self.repos.items()
            }


def as_blob(path: str, content: Content) -> Blob:
    """A file as it would be stored: large or binary ones as large files."""
    if isinstance(content, Path):
        content = content.read_bytes()
    data = content.encode() if isinstance(content, str) else content
    return Blob(data, lfs=is_large(path, len(data)))


def is_large(path: str, size: int) -> bool:
    """Whether a file is uploaded as a large file; an empty one never is."""
    return size > 0 and (size > LARGE or path.endswith(tuple(LARGE_ENDINGS)))
