"""The Hub's HTTP interface over a `HubStore`: routes, status codes, headers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, unquote

import yaml
from hub_store import Blob, Commit, HubError, HubStore, Repo, User, is_large

_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_VERBS = {
    *(
        "resolve",
        "raw",
        "tree",
        "revision",
        "refs",
        "commits",
        "commit",
        "preupload",
        "branch",
        "tag",
    ),
    *("paths-info", "settings", "auth-check"),
}


class Settings(Protocol):
    """What the interface needs of its server."""

    store: HubStore
    page_size: int


@dataclass
class Incoming:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    token: str | None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def first(self, name: str, default: str = "") -> str:
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        return self.first(name).lower() in ("1", "true")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        return cls(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers}
        )

    @classmethod
    def error(cls, problem: HubError) -> Answer:
        answer = cls.of({"error": problem.message, **problem.body}, problem.status)
        answer.headers["X-Error-Message"] = problem.message
        if problem.code:
            answer.headers["X-Error-Code"] = problem.code
        return answer


class HubApi:
    """Turns requests into answers."""

    def __init__(self, settings: Settings, endpoint: str, cdn: str) -> None:
        self.settings, self.endpoint, self.cdn = settings, endpoint, cdn

    @property
    def store(self) -> HubStore:
        return self.settings.store

    def answer(self, request: Incoming) -> Answer:
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        if parts[0] == "_cdn":
            return self._content(request, self.store.objects[parts[1]], {"ETag": f'"{parts[1]}"'})
        if parts[0] == "_upload":
            return self._upload(request, parts[1])
        user = self._user(request)
        if parts[0] == "api":
            if parts[1] in _KINDS and len(parts) > 2:
                kind = _KINDS[parts[1]]
                repo_id, rest = self._split(kind, parts[2:])
                repo_id = self.store.moved.get((kind, repo_id), repo_id)
                return self._repo_api(request, user, kind, repo_id, rest)
            return self._general_api(request, user, "/".join(parts[1:]))
        kind = "model"
        if parts[0] in ("datasets", "spaces"):
            kind, parts = _KINDS[parts[0]], parts[1:]
        if parts[-3:] == ["lfs", "objects", "batch"]:
            repo_id = "/".join(parts[:-4]).removesuffix(".git")
            return self._lfs_batch(request, user, kind, repo_id)
        if parts[-2:] == ["lfs", "verify"]:
            return self._lfs_verify(request)
        repo_id, rest = self._split(kind, parts)
        if len(rest) > 2 and rest[0] in ("resolve", "raw"):
            return self._resolve(request, user, kind, repo_id, rest[1], "/".join(rest[2:]))
        raise HubError(404, None, f"The Hub double has no page {request.path}")

    def _split(self, kind: str, parts: list[str]) -> tuple[str, list[str]]:
        if len(parts) == 1 or parts[1] in _VERBS or (kind, parts[0]) in self.store.repos:
            return parts[0], parts[1:]
        return "/".join(parts[:2]), parts[2:]

    def _user(self, request: Incoming) -> User | None:
        if request.token is None:
            return None
        if request.token not in self.store.users:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return self.store.users[request.token]

    # ------------------------------------------------------------------ without a repository

    def _general_api(self, request: Incoming, user: User | None, path: str) -> Answer:
        if path == "whoami-v2":
            if user is None:
                raise HubError(401, None, "Invalid username or password.")
            orgs = [{"name": name, "type": "org", "roleInOrg": "write"} for name in user.orgs]
            token = {"accessToken": {"displayName": "test", "role": user.role}}
            return Answer.of({"type": "user", "name": user.name, "orgs": orgs, "auth": token})
        if path == "validate-yaml":
            return self._validate_yaml(request.json()["content"])
        if path == "repos/create":
            return self._create(request.json(), user)
        if path == "repos/delete":
            body = request.json()
            kind = body.get("type") or "model"
            repo_id = f"{body['organization']}/{body['name']}"
            self.store.writable(kind, repo_id, user)
            del self.store.repos[kind, repo_id]
            return Answer.of({})
        if path in _KINDS:
            return self._list(request, user, _KINDS[path])
        raise HubError(404, None, f"The Hub double has no /api/{path}")

    def _validate_yaml(self, content: str) -> Answer:
        match = re.match(r"^---[ ]*\n(.*?)\n---", content, re.DOTALL)
        if not match:
            warning = {"message": "empty or missing yaml metadata in repo card"}
            return Answer.of({"errors": [], "warnings": [warning]})
        try:
            data = yaml.safe_load(match.group(1))
        except yaml.YAMLError as error:
            return Answer.of({"errors": [{"message": str(error)}], "warnings": []}, 400)
        if not isinstance(data, dict):
            return Answer.of({"errors": [{"message": "metadata is no map"}], "warnings": []}, 400)
        return Answer.of({"errors": [], "warnings": []})

    def _create(self, body: dict[str, Any], user: User | None) -> Answer:
        if user is None:
            raise HubError(401, None, "Invalid username or password.")
        kind, owner = body.get("type") or "model", body.get("organization") or user.name
        if not self.store.may_write(owner, user):
            raise HubError(
                403,
                None,
                f'You don\'t have the rights to create a {kind} under the namespace "{owner}"',
            )
        repo_id = f"{owner}/{body['name']}"
        try:
            private = body.get("visibility") == "private" or bool(body.get("private"))
            repo = self.store.create(
                repo_id, kind, private=private, sdk=body.get("sdk"), author=user.name
            )
        except HubError as problem:
            problem.body["url"] = f"{self.endpoint}/{problem.body.pop('repo_id')}"
            raise
        return Answer.of({"url": f"{self.endpoint}/{repo.url_path}", "name": repo.id})

    def _list(self, request: Incoming, user: User | None, kind: str) -> Answer:
        author = request.first("author")
        found = []
        for other_kind, repo_id in sorted(self.store.repos):
            if other_kind != kind or (author and not repo_id.startswith(f"{author}/")):
                continue
            try:
                repo = self.store.readable(kind, repo_id, user)
            except HubError:
                continue
            found.append(self._info(repo, self.store.resolve(repo, "main"), blobs=False))
        return Answer.of(found)

    # ------------------------------------------------------------------ of a repository

    def _repo_api(
        self, request: Incoming, user: User | None, kind: str, repo_id: str, rest: list[str]
    ) -> Answer:
        verb = rest[0] if rest else "info"
        revision = rest[1] if len(rest) > 1 else "main"
        writing: dict[tuple[str, str], Callable[..., Answer]] = {
            ("POST", "preupload"): self._preupload,
            ("POST", "commit"): self._commit,
            ("POST", "branch"): self._branch,
            ("DELETE", "branch"): self._branch,
            ("POST", "tag"): self._tag,
            ("DELETE", "tag"): self._tag,
            ("PUT", "settings"): self._change_settings,
        }
        if (request.method, verb) in writing:
            repo = self.store.writable(kind, repo_id, user, pr=request.flag("create_pr"))
            return writing[request.method, verb](request, repo, user, revision)
        repo = self.store.readable(kind, repo_id, user)
        if verb in ("info", "revision"):
            commit = self.store.resolve(repo, revision)
            return Answer.of(self._info(repo, commit, blobs=request.flag("blobs")))
        self.store.open_files(repo, user)
        if verb == "auth-check":
            return Answer.of({})
        if verb == "refs":
            return self._refs(request, repo)
        if verb == "tree":
            return self._tree(request, repo, revision, "/".join(rest[2:]))
        if verb == "paths-info":
            return self._paths_info(request, repo, revision)
        if verb == "commits":
            return Answer.of(
                [
                    {
                        "id": commit.sha,
                        "title": commit.title,
                        "message": commit.description,
                        "date": commit.date,
                        "authors": [{"user": commit.author}],
                    }
                    for commit in self.store.log(repo, revision)
                ]
            )
        raise HubError(404, None, f"The Hub double has no {request.method} {request.path}")

    def _info(self, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
        siblings = []
        for path, blob in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": path}
            if blobs:
                entry |= {"size": blob.size, "blobId": blob.oid}
                if blob.lfs:
                    entry["lfs"] = {
                        "sha256": blob.sha256,
                        "size": blob.size,
                        "pointerSize": len(blob.pointer),
                    }
            siblings.append(entry)
        card: Any = {}
        match = re.match(
            r"---\s*\n(.*?)\n---", commit.files.get("README.md", _EMPTY).data.decode(), re.DOTALL
        )
        if match:
            card = yaml.safe_load(match.group(1)) or {}
        return {
            "_id": repo.id,
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.owner,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": self.store.log(repo, commit.sha)[-1].date,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": list(card.get("tags") or []),
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card or None,
            "siblings": siblings,
            **({"sdk": repo.sdk} if repo.sdk else {}),
        }

    def _refs(self, request: Incoming, repo: Repo) -> Answer:
        def of(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in repo.refs.items()
                if ref.startswith(prefix)
            ]

        found = {"branches": of("refs/heads/"), "tags": of("refs/tags/"), "converts": []}
        if request.first("include_prs"):
            found["pullRequests"] = of("refs/pr/")
        return Answer.of(found)

    def _entries(self, commit: Commit, *, expand: bool) -> dict[str, dict[str, Any]]:
        last = {"id": commit.sha, "title": commit.title, "date": commit.date}
        found: dict[str, dict[str, Any]] = {}
        for path, blob in sorted(commit.files.items()):
            for i in range(1, path.count("/") + 1):
                folder = "/".join(path.split("/")[:i])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                found[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
            entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
            if blob.lfs:
                entry["lfs"] = {
                    "oid": blob.sha256,
                    "size": blob.size,
                    "pointerSize": len(blob.pointer),
                }
            found[path] = entry
        if expand:
            for entry in found.values():
                entry["lastCommit"] = last
        return found

    def _tree(self, request: Incoming, repo: Repo, revision: str, folder: str) -> Answer:
        commit = self.store.resolve(repo, revision)
        entries = self._entries(commit, expand=request.flag("expand"))
        if folder and entries.get(folder, {}).get("type") != "directory":
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        prefix = f"{folder}/" if folder else ""
        found = [
            entry
            for path, entry in entries.items()
            if path.startswith(prefix)
            and (request.flag("recursive") or "/" not in path[len(prefix) :])
        ]
        start, size = int(request.first("cursor", "0")), self.settings.page_size
        answer = Answer.of(found[start : start + size])
        if start + size < len(found):
            query = "&".join(
                f"{name}={quote(values[0])}"
                for name, values in request.query.items()
                if name != "cursor"
            )
            url = f"{self.endpoint}{request.path}?{query}&cursor={start + size}"
            answer.headers["Link"] = f'<{url}>; rel="next"'
        return answer

    def _paths_info(self, request: Incoming, repo: Repo, revision: str) -> Answer:
        if "json" in request.headers.get("content-type", ""):
            body = request.json()
            paths, expand = body["paths"], bool(body.get("expand"))
        else:
            form = parse_qs(request.body.decode())
            paths = form.get("paths", [])
            expand = form.get("expand", [""])[0].lower() == "true"
        entries = self._entries(self.store.resolve(repo, revision), expand=expand)
        return Answer.of([entries[path] for path in paths if path in entries])

    # ------------------------------------------------------------------ downloads

    def _resolve(
        self, request: Incoming, user: User | None, kind: str, repo_id: str, rev: str, path: str
    ) -> Answer:
        if (kind, repo_id) in self.store.moved:
            new = self.store.moved[kind, repo_id]
            return Answer(307, headers={"Location": request.path.replace(repo_id, new, 1)})
        repo = self.store.readable(kind, repo_id, user)
        self.store.open_files(repo, user)
        commit = self.store.resolve(repo, rev)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            answer = Answer.error(HubError(404, "EntryNotFound", "Entry not found"))
            answer.headers |= headers
            return answer
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            headers |= {
                "X-Linked-Size": str(blob.size),
                "X-Linked-Etag": f'"{blob.etag}"',
                "Location": f"{self.cdn}/_cdn/{blob.sha256}?signature=double",
            }
            return Answer(302, b"", headers)
        return self._content(request, blob.data, headers)

    def _content(self, request: Incoming, data: bytes, headers: dict[str, str]) -> Answer:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if asked:
            first, last = asked.groups()
            start = int(first) if first else max(len(data) - int(last), 0)
            end = min(int(last) + 1 if first and last else len(data), len(data))
            if start >= len(data):
                return Answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            return Answer(206, data[start:end], headers)
        headers["Content-Length"] = str(len(data))
        return Answer(200, data, headers)

    # ------------------------------------------------------------------ uploads

    def _preupload(self, request: Incoming, repo: Repo, user: User, revision: str) -> Answer:
        commit = self.store.resolve(repo, revision)
        found = []
        for file in request.json()["files"]:
            known = commit.files.get(file["path"])
            found.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    **({"oid": known.etag} if known else {}),
                }
            )
        return Answer.of({"files": found})

    def _lfs_batch(self, request: Incoming, user: User | None, kind: str, repo_id: str) -> Answer:
        body = request.json()
        # A pull request names no branch here: who may read may propose.
        repo = self.store.writable(kind, repo_id, user, pr="ref" not in body)
        if "ref" in body:
            self.store.resolve(repo, body["ref"]["name"])
        new = [item for item in body["objects"] if item["oid"] not in repo.large]
        if self.store.quota is not None:
            used = sum(len(self.store.objects[oid]) for oid in repo.large)
            if used + sum(item["size"] for item in new) > self.store.quota:
                raise HubError(
                    403, None, "Storage limit reached, please upgrade your plan to increase it"
                )
        objects: list[dict[str, Any]] = []
        git = f"{self.endpoint}/{repo.url_path}.git/info/lfs"
        for item in body["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item in new:
                upload = f"{self.cdn}/_upload/{item['oid']}?repo={repo.type}:{repo.id}"
                entry["actions"] = {
                    "upload": {"href": upload},
                    "verify": {"href": f"{git.removesuffix('/info/lfs')}/lfs/verify"},
                }
            objects.append(entry)
        return Answer.of({"transfer": "basic", "objects": objects})

    def _upload(self, request: Incoming, oid: str) -> Answer:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, None, "The content has another SHA256 than was announced")
        kind, _, repo_id = request.first("repo").partition(":")
        with self.store.lock:
            self.store.objects[oid] = request.body
            self.store.repos[kind, repo_id].large.add(oid)
        return Answer(200, b"", {"ETag": f'"{oid}"'})

    def _lfs_verify(self, request: Incoming) -> Answer:
        body = request.json()
        if len(self.store.objects.get(body["oid"], b"")) != body["size"]:
            raise HubError(404, None, "Object does not exist")
        return Answer.of({})

    def _commit(self, request: Incoming, repo: Repo, user: User, revision: str) -> Answer:
        header: dict[str, Any] = {}
        changes: dict[str, Blob | None] = {}
        tree = self.store.resolve(repo, revision).files
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                data = base64.b64decode(value["content"])
                changes[value["path"]] = Blob(data, lfs=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in repo.large:
                    raise HubError(
                        400, None, f"lfs pointer of {value['path']} points to no uploaded object"
                    )
                changes[value["path"]] = Blob(self.store.objects[value["oid"]], lfs=True)
            elif item["key"] == "deletedFile":
                changes[value["path"]] = None
            elif item["key"] == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                changes |= {path: None for path in tree if path.startswith(prefix)}
        commit, number = self.store.commit(
            repo,
            revision,
            changes,
            header["summary"],
            header.get("description", ""),
            author=user.name,
            parent=header.get("parentCommit"),
            create_pr=request.flag("create_pr"),
        )
        url = f"{self.endpoint}/{repo.url_path}"
        found = {
            "success": True,
            "commitOid": commit.sha,
            "commitUrl": f"{url}/commit/{commit.sha}",
            "hookOutput": "",
        }
        if number is not None:
            found["pullRequestUrl"] = f"{url}/discussions/{number}"
        return Answer.of(found)

    # ------------------------------------------------------------------ branches and tags

    def _branch(self, request: Incoming, repo: Repo, user: User, branch: str) -> Answer:
        return self._change_ref(
            request, repo, f"refs/heads/{branch}", request.json().get("startingPoint") or "main"
        )

    def _tag(self, request: Incoming, repo: Repo, user: User, revision: str) -> Answer:
        # Creating names the revision in the path and the tag in the body, deleting the tag in the path.
        tag = request.json()["tag"] if request.method == "POST" else revision
        return self._change_ref(request, repo, f"refs/tags/{tag}", revision)

    def _change_ref(self, request: Incoming, repo: Repo, ref: str, start: str) -> Answer:
        with self.store.lock:
            if request.method == "DELETE":
                if ref not in repo.refs:
                    raise HubError(404, "RevisionNotFound", f"{ref} does not exist")
                del repo.refs[ref]
                return Answer.of({})
            if ref in repo.refs:
                raise HubError(409, None, f"{ref} already exists")
            repo.refs[ref] = self.store.resolve(repo, start).sha
        return Answer.of({})

    def _change_settings(self, request: Incoming, repo: Repo, user: User, _: str) -> Answer:
        body = request.json()
        if "private" in body or "visibility" in body:
            repo.private = bool(body.get("private")) or body.get("visibility") == "private"
        if "gated" in body:
            repo.gated = body["gated"] in ("auto", "manual")
        return Answer.of(body)


_EMPTY = Blob(b"", lfs=False)
