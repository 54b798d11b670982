"""A model hub on this machine: as much of its HTTP interface as one commit and one download take."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What was pushed.

    Attributes:
        endpoint: the server's address.
        repos: name -> path -> content.
        private: names of the repositories that are.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)

    def commit(self, repo: str) -> str:
        """The name of the state that a repository is in."""
        files = self.repos[repo]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


@contextmanager
def served() -> Iterator[Hub]:
    """A hub, while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(each for each in (asked.get("organization"), asked["name"]) if each)
                hub.repos.setdefault(name, {})
                if asked.get("private") or asked.get("visibility") == "private":
                    hub.private.add(name)
                self.answer({"url": f"{hub.endpoint}/{name}"})
            elif path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
                self.answer({"files": modes})
            else:
                repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in body.splitlines():
                    part = json.loads(line)
                    if part["key"] == "file":
                        hub.repos[repo][part["value"]["path"]] = base64.b64decode(part["value"]["content"])
                commit = hub.commit(repo)
                self.answer({"commitUrl": f"{hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit})

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
            if repo not in hub.repos:
                self.answer({"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"})
                return
            files, commit = hub.repos[repo], hub.commit(repo)
            if "/tree/" in path:
                self.answer(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in files.items()
                    ]
                )
            elif path.startswith("/api/"):
                self.answer({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
            else:
                content = files[path.split("/", 5)[5]]
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(content, headers={"ETag": tag, "X-Repo-Commit": commit})

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer(self, value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, each in (headers or {}).items():
                self.send_header(name, each)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
