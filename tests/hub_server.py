"""A Hub of one's own on a local port: real HTTP, for tests that push and load in fresh processes.

It answers what huggingface_hub asks for models, datasets and spaces, with the errors, redirects and headers of
the real one, can be told to fail in many ways, and remembers every request.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_api import Answer, HubApi, Incoming
from hub_store import Commit, Content, HubError, HubStore

ROOT = Path(__file__).resolve().parents[1]
_BLOCKER = """
import sys

class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, _Blocked())
"""


@dataclass
class Fault:
    """What is to go wrong, and how often; `match` is searched in `"METHOD /path?query"`."""

    kind: str
    match: re.Pattern[str]
    times: int
    status: int = 503
    message: str = "The Hub double was told to fail"
    code: str | None = None
    seconds: float = 0.0
    after: int = 0


@dataclass
class Seen:
    """One request as it arrived, and the status of its answer (0: the connection was cut)."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    status: int = 0

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}" + (f"?{self.query}" if self.query else "")


@dataclass
class Outcome:
    """How a snippet in a fresh process ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def value(self) -> Any:
        """The last line of standard output, as JSON."""
        return json.loads(self.stdout.strip().splitlines()[-1])


@dataclass
class HubDouble:
    """A running Hub: `endpoint` is its address, `store` what it holds, `requests` what it was asked."""

    folder: Path
    store: HubStore = field(default_factory=HubStore)
    requests: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    page_size: int = 1000

    def __post_init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.hub = self  # type: ignore[attr-defined]
        port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        # Large files come from another host, as on the real Hub: tokens must not go there.
        self.api = HubApi(self, self.endpoint, f"http://localhost:{port}")
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()
        self._homes = 0

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    # ------------------------------------------------------------------ content

    def put(self, repo_id: str, files: Mapping[str, Content] | Path, **values: Any) -> Commit:
        """Commit files or a folder directly; `kind`, `revision`, `private`, `gated` as in the store."""
        return self.store.put(repo_id, files, **values)

    def files(
        self, repo_id: str, revision: str = "main", kind: str = "model", *, plumbing: bool = False
    ) -> dict[str, bytes]:
        """Content by path, without the `.gitattributes` that the Hub puts into every repository."""
        repo = self.store.repos[kind, repo_id]
        return {
            path: blob.data
            for path, blob in self.store.resolve(repo, revision).files.items()
            if plumbing or path != ".gitattributes"
        }

    def log(self, repo_id: str, revision: str = "main", kind: str = "model") -> list[Commit]:
        """Commits, the last one first."""
        return self.store.log(self.store.repos[kind, repo_id], revision)

    def state(self) -> dict[str, Any]:
        """All public state, to see that nothing was changed."""
        return self.store.state()

    # ------------------------------------------------------------------ faults

    def fail(
        self,
        match: str = "",
        *,
        status: int = 503,
        times: int = 1_000_000,
        message: str = "The Hub double was told to fail",
        code: str | None = None,
    ) -> None:
        """Answer the next requests that match with an error."""
        self.faults.append(Fault("status", re.compile(match), times, status, message, code))

    def slow(self, match: str = "", *, seconds: float, times: int = 1_000_000) -> None:
        """Wait before answering."""
        self.faults.append(Fault("slow", re.compile(match), times, seconds=seconds))

    def cut(self, match: str = "", *, after: int = 0, times: int = 1_000_000) -> None:
        """Close the connection after so many bytes of the answer's body; nothing has been changed."""
        self.faults.append(Fault("cut", re.compile(match), times, after=after))

    def cut_upload(self, match: str = "", *, after: int = 0, times: int = 1_000_000) -> None:
        """Close the connection after so many bytes of the request's body."""
        self.faults.append(Fault("cut_upload", re.compile(match), times, after=after))

    def lose_answer(self, match: str = "", *, times: int = 1) -> None:
        """Do what is asked, but close the connection instead of saying so."""
        self.faults.append(Fault("lose", re.compile(match), times))

    def mend(self) -> None:
        """No more faults."""
        self.faults.clear()

    def take_fault(self, line: str, kinds: tuple[str, ...]) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.times > 0 and fault.match.search(line):
                    fault.times -= 1
                    return fault
        return None

    # ------------------------------------------------------------------ requests

    def seen(self, match: str = "") -> list[Seen]:
        """Requests whose `"METHOD /path?query"` contains a match of this regular expression."""
        return [request for request in self.requests if re.search(match, request.line)]

    def forget(self) -> None:
        """Forget the requests so far."""
        self.requests.clear()

    # ------------------------------------------------------------------ fresh processes

    def environment(
        self,
        *,
        token: str | None = None,
        home: Path | None = None,
        blocked: tuple[str, ...] = (),
        **more: str,
    ) -> dict[str, str]:
        """Environment of a process that knows no Hub but this one; `home` is its (empty) `HF_HOME`."""
        if home is None:
            self._homes += 1
            home = self.folder / f"home-{self._homes}"
        paths = [str(ROOT), str(ROOT / "tests")]
        if blocked:
            hook = self.folder / "blocked"
            hook.mkdir(exist_ok=True)
            (hook / "sitecustomize.py").write_text(_BLOCKER.format(names=set(blocked)))
            paths = [str(hook)]
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "BAYESVLM_", "PYTHON"))
        }
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "no_proxy": "*",
            **({"HF_TOKEN": token} if token else {}),
            **more,
        }

    def run(
        self,
        code: str,
        *,
        token: str | None = None,
        home: Path | None = None,
        blocked: tuple[str, ...] = (),
        check: bool = True,
        timeout: float = 300,
        **environment: str,
    ) -> Outcome:
        """Run Python code in a fresh process against this Hub.

        Args:
            code: Source; it is dedented.
            token: `HF_TOKEN` of the process.
            home: `HF_HOME`, if a cache is to be kept between processes.
            blocked: Packages that cannot be imported there.
            check: Fail where the process fails.
            timeout: Seconds after which it is killed.
            **environment: Further variables.
        """
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        return self.call(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=self.environment(token=token, home=home, blocked=blocked, **environment),
            check=check,
            timeout=timeout,
            cwd=work,
        )

    def call(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        check: bool = True,
        timeout: float = 300,
        cwd: Path | None = None,
    ) -> Outcome:
        """Run a command."""
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def clear_home(self, home: Path) -> None:
        """Empty a cache."""
        shutil.rmtree(home, ignore_errors=True)


class _CutError(Exception):
    """The connection is to be closed without a (whole) answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "HubDouble"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def setup(self) -> None:
        super().setup()
        # Small answers must not wait for acknowledgements.
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _serve(self) -> None:
        hub: HubDouble = self.server.hub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, unquote(url.path), url.query, headers, b"")
        hub.requests.append(seen)
        try:
            cut = hub.take_fault(seen.line, ("cut_upload",))
            seen.body = self._body(headers, cut.after if cut else None)
            delay = hub.take_fault(seen.line, ("slow",))
            if delay:
                time.sleep(delay.seconds)
            answer = self._answer(hub, seen, url.path)
            if hub.take_fault(seen.line, ("lose",)):
                raise _CutError
            seen.status = answer.status
            # Whoever reads an answer will find it in the record.
            cut = hub.take_fault(seen.line, ("cut",))
            self._send(answer, cut.after if cut else None)
        except (_CutError, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self._abort()

    def _answer(self, hub: HubDouble, seen: Seen, raw_path: str) -> Answer:
        fault = hub.take_fault(seen.line, ("status",))
        try:
            if fault:
                raise HubError(fault.status, fault.code, fault.message)
            pending = any(
                fault.kind == "cut" and fault.times > 0 and fault.match.search(seen.line)
                for fault in hub.faults
            )
            if pending and seen.method not in ("GET", "HEAD"):
                raise _CutError
            query = parse_qs(seen.query, keep_blank_values=True)
            return hub.api.answer(
                Incoming(seen.method, raw_path, query, seen.headers, seen.body, seen.token)
            )
        except HubError as problem:
            return Answer.error(problem)

    def _body(self, headers: dict[str, str], cut: int | None) -> bytes:
        if cut is not None:
            self.rfile.read(min(cut, int(headers.get("content-length", cut))))
            raise _CutError
        if headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(headers.get("content-length", 0)))

    def _send(self, answer: Answer, cut: int | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None:
            self.wfile.write(answer.body[:cut])
            self.wfile.flush()
            raise _CutError
        self.wfile.write(answer.body)

    def _abort(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
