"""A small server that speaks the part of the Hub's protocol that reading and pushing a model needs, and counts."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A running server. served: (file, first byte, bytes sent) per answer; fail_after: weight bytes until it fails."""

    url: str = ""
    served: list[tuple[str, int, int]] = field(default_factory=list)
    fail_after: int | None = None

    def weight_bytes(self) -> int:
        """Bytes of weight files sent so far."""
        return sum(count for name, _, count in self.served if name.endswith(".safetensors"))


@contextmanager
def serve(repository: str, folder: Path) -> Iterator[Hub]:
    """Serve one folder as a model repository on this machine, for the length of a `with` block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if re.fullmatch(rf"/api/models/{repository}(/revision/[^/]+)?", path):
                self._send_json(
                    {"id": repository, "sha": SHA, "siblings": [_sibling(folder, file) for file in _files(folder)]}
                )
            elif match := re.fullmatch(rf"/api/models/{repository}/tree/[^/]+/?(.*)", path):
                inside = [file for file in _files(folder) if file.startswith(match[1])]
                if not inside:
                    self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                    return
                self._send_json([{"type": "file", "path": file, **_sibling(folder, file)} for file in inside])
            elif match := re.fullmatch(rf"/{repository}/resolve/[^/]+/(.+)", path):
                self._send_file(match[1])
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def do_POST(self) -> None:
            path = self.path.split("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length", "0"))).decode()
            if path == "/api/repos/create":
                self._send_json({"url": f"{hub.url}/{repository}", "id": repository})
            elif path == "/api/validate-yaml":
                self._send_json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [file["path"] for file in json.loads(body)["files"]]
                ways = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
                self._send_json({"files": ways})
            elif "/commit/" in path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        target = folder / line["value"]["path"]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(base64.b64decode(line["value"]["content"]))
                where = f"{hub.url}/{repository}/commit/{SHA}"
                self._send_json({"commitUrl": where, "commitOid": SHA, "commitMessage": "", "commitDescription": ""})
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _send_json(self, data: object) -> None:
            self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

        def _send_file(self, name: str) -> None:
            if name not in _files(folder):
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
                return
            content = (folder / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None:
                self._send(200, content, headers, name)
                return
            start, stop = int(asked[1]), int(asked[2]) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206, content[start:stop], headers, name, start)

        def _send(self, code: int, body: bytes, headers: dict[str, str], name: str = "", start: int = 0) -> None:
            self.send_response(code)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            limit = hub.fail_after if name.endswith(".safetensors") else None
            if limit is not None and hub.weight_bytes() + len(body) > limit:
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)
            if name:
                hub.served.append((name, start, len(body)))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sibling(folder: Path, file: str) -> dict[str, object]:
    content = (folder / file).read_bytes()
    return {"rfilename": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest(), "blobId": file}
