"""A Hub in a thread: serves folders as public model repositories, takes commits, writes down what was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StubHub:
    """What the stub serves and has seen.

    Attributes:
        root: Holds `owner/name/file`.
        sizes: Sizes that are announced in place of the true ones, by `owner/name/file`.
        url: Where it listens.
        requests: Method and path of every request.
        tokens: Authorization headers that came.
        created: What repositories were created with.
        commits: Bodies of the commits that were pushed.
    """

    root: Path
    sizes: dict[str, int] = field(default_factory=dict)
    url: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)


@contextmanager
def running_hub(root: Path) -> Iterator[StubHub]:
    """Serve a folder.

    Args:
        root: Holds `owner/name/file`.

    Yields:
        The hub.
    """
    hub = StubHub(root)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"POST {path}")
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            reply: dict[str, Any] = {}
            if path == "api/repos/create":
                hub.created.append(json.loads(text))
                asked = hub.created[-1]
                name = asked["name"] if "/" in asked["name"] else f"me/{asked['name']}"
                reply = {"url": f"{hub.url}/spaces/{name}"}
            elif "/preupload/" in path:
                # Everything goes into the commit itself.
                names = [file["path"] for file in json.loads(text)["files"]]
                modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                reply = {"files": [{"path": name, **modes} for name in names]}
            elif "/commit/" in path:
                hub.commits.append(text)
                reply = {
                    "commitUrl": f"{hub.url}/spaces/me/demo/commit/{COMMIT}",
                    "commitOid": COMMIT,
                }
            self.send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"}, True)

        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} {path}")
            if "Authorization" in self.headers:
                hub.tokens.append(self.headers["Authorization"])
            parts = path.split("/")
            if parts[:2] == ["api", "spaces"]:
                listing = (
                    b"[]" if "tree" in parts else json.dumps({"id": path, "sha": COMMIT}).encode()
                )
                self.send(200, listing, {"Content-Type": "application/json"}, body)
            elif parts[:2] == ["api", "models"] and len(parts) >= 4:
                self.send_info("/".join(parts[2:4]), tree="tree" in parts[4:], body=body)
            elif len(parts) >= 5 and parts[2] == "resolve":
                self.send_file("/".join(parts[:2]), "/".join(parts[4:]), body)
            else:
                self.send(404, b"", {}, body)

        def send_info(self, repo: str, *, tree: bool, body: bool) -> None:
            folder = hub.root / repo
            if not folder.is_dir():
                headers = {
                    "X-Error-Code": "RepoNotFound",
                    "X-Error-Message": "Repository not found",
                }
                self.send(401, b"{}", headers, body)
                return
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            entries = [
                (
                    path.relative_to(folder).as_posix(),
                    hub.sizes.get(f"{repo}/{path.name}", path.stat().st_size),
                )
                for path in files
            ]
            info: object = {
                "id": repo,
                "sha": COMMIT,
                "siblings": [{"rfilename": name, "size": size} for name, size in entries],
            }
            if tree:
                info = [
                    {"type": "file", "path": name, "size": size, "oid": COMMIT}
                    for name, size in entries
                ]
            self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

        def send_file(self, repo: str, name: str, body: bool) -> None:
            path = hub.root / repo / name
            if not path.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            data = path.read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            self.send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)

        def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
