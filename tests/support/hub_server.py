"""A server on the loopback that speaks the protocol of the Hugging Face Hub, with faults that can be asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".parquet", ".bin", ".gguf")  # what the Hub keeps by sha256, as Git LFS does
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/?]+)(?:\?.*)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+?)(?:\?.*)?")


@dataclass
class Repository:
    """A directory that is served; ``revisions`` maps branches and tags to commits, each of which has these files."""

    folder: Path
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    gated: bool = False

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def commit(self, revision: str) -> str | None:
        return self.revisions.get(revision, revision if revision in self.revisions.values() else None)


@dataclass
class Hub:
    """What is served, what goes wrong, and what was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    url: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, range
    token: str = ""  # that a gated repository asks for
    cut_at: int = 0  # the first answer with a longer body is cut there
    dies_at: int = 0  # from the first body that is longer on, no request is answered any more
    busy: int = 0  # so many answers are 429
    fails: int = 0  # the status of every answer
    wrong_bytes: bool = False
    stopped: bool = False

    def asked(self, ending: str, method: str = "GET") -> list[tuple[str, str, str]]:
        return [each for each in self.requests if each[0] == method and each[1].split("?")[0].endswith(ending)]


def _tree_entry(repository: Repository, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    name = str(path.relative_to(repository.folder))
    entry = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.suffix in LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            hub.requests.append((self.command, unquote(self.path), self.headers.get("Range", "")))
            if hub.stopped:
                self._hang_up()
                return
            if hub.busy:
                hub.busy -= 1
                self._send(429, b"slow down", {"Retry-After": "1"})
                return
            if hub.fails:
                self._send(hub.fails, b"{}")
                return
            api, file = _API.fullmatch(self.path), _FILE.fullmatch(self.path)
            if api:
                key = ("datasets/" if api[1] == "datasets" else "") + api[2]
                self._of_repository(key, unquote(api[4]), api[3])
            elif file:
                self._of_repository((file[1] or "") + file[2], unquote(file[3]), "file", unquote(file[4]))
            else:
                self._send(404, b"")

        def _of_repository(self, key: str, revision: str, what: str, name: str = "") -> None:
            repository = hub.repositories.get(key)
            if repository is None:
                self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if repository.gated and what == "file" and (not token or token != hub.token):
                self._send(403 if token else 401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
                return
            commit = repository.commit(revision)
            if commit is None:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            elif what == "revision":
                siblings = [{"rfilename": str(path.relative_to(repository.folder))} for path in repository.files()]
                about = {"id": key.removeprefix("datasets/"), "sha": commit, "siblings": siblings, "private": False}
                self._send(200, json.dumps(about).encode())
            elif what == "tree":
                listed = [_tree_entry(repository, path) for path in repository.files()]
                self._send(200, json.dumps(listed).encode())
            elif not (repository.folder / name).is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            else:
                self._file(repository, commit, repository.folder / name)

        def _file(self, repository: Repository, commit: str, path: Path) -> None:
            data, entry = path.read_bytes(), _tree_entry(repository, path)
            large = entry.get("lfs")
            etag = large["oid"] if large else entry["oid"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if large:
                headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
                if hub.wrong_bytes:
                    data = data[:-1] + bytes([data[-1] ^ 1])
            first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if first and self.command == "GET":
                start = int(first[1])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self._send(206, data[start:], headers)
            else:
                self._send(200, data, headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = hub.cut_at or hub.dies_at
            if cut and len(body) > cut:
                self.wfile.write(body[:cut])
                self.wfile.flush()
                hub.cut_at, hub.stopped = 0, bool(hub.dies_at)
                self._hang_up()
                return
            self.wfile.write(body)

        def _hang_up(self) -> None:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


@contextlib.contextmanager
def serving(**repositories: Path) -> Iterator[Hub]:
    """Serve directories by name, "org__name" for org/name, "datasets__org__name" for data, until the block ends."""
    hub = Hub({name.replace("__", "/"): Repository(folder) for name, folder in repositories.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask_here(hub: Hub, home: Path, monkeypatch: Any) -> None:
    """Let this process ask the server, with a cache of its own; the library has read its environment long before."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HPC_HESS_NAMES_ONLINE", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def asking(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a program that asks this server, with a cache of its own, and nothing that forbids it."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",  # as the program itself sets these two
        "HPC_HESS_NAMES_ONLINE": "1",
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN_PATH": str(home / "no-token"),
        **more,
    }
