"""A small server that speaks the part of the Hub's protocol that reading and pushing a model needs, and counts."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

SHA = "0123456789abcdef0123456789abcdef01234567"
RELATIONS = {"adapter", "merge", "quantized", "finetune"}  # what the Hub knows of base_model_relation
Refusal = tuple[int, str]


@dataclass
class Hub:
    """A running server and what came to it.

    repositories: the folder of each; making one adds a folder beside the first. served: (file, first byte, bytes sent)
    per answer; fail_after: weight bytes until it fails. objects: large files by their hash, sent: their bytes as they
    came in, accepts: how many it takes before it fails. account: what the token is, refused by path: status and reason.
    commits: branch, pull request or not, files and what was deleted.
    """

    repositories: dict[str, Path]
    url: str = ""
    served: list[tuple[str, int, int]] = field(default_factory=list)
    fail_after: int | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    accepts: int | None = None
    account: dict[str, Any] | None = None
    refused: dict[str, Refusal] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    branches: set[str] = field(default_factory=lambda: {"main"})
    commits: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def weight_bytes(self) -> int:
        """Bytes of weight files sent so far."""
        return sum(count for name, _, count in self.served if name.endswith(".safetensors"))


@contextmanager
def serve(repository: str, folder: Path, **others: Path) -> Iterator[Hub]:
    """Serve one folder as a model repository on this machine, for the length of a `with` block.

    others: further ones, of the same organisation, by name.
    """
    organisation = repository.partition("/")[0]
    hub = Hub({repository: folder, **{f"{organisation}/{name}": path for name, path in others.items()}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()


@contextmanager
def using(hub: Hub, folder: Path) -> Iterator[None]:
    """Have this process take a server for its Hub, for the length of a `with` block, and cache in a folder."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_TOKEN_PATH": str(folder / "token"),
            "HF_HOME": str(folder),
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", "hf_alice")
        yield


def check_card(card: str) -> list[str]:
    """What the Hub has against a model card: the rules of its documentation, as far as shortcut's cards go."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    front = yaml.safe_load(match[1]) if match else None
    if not isinstance(front, dict):
        return ["no front matter"]
    texts = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation")
    errors = [f"{key} must be a string" for key in texts if not isinstance(front.get(key, ""), str)]
    for key in ("language", "datasets", "tags", "base_model"):
        values = front.get(key, [])
        values = values if isinstance(values, list) else [values]
        errors += [f"{key} must be a string or strings" for value in values if not isinstance(value, str)]
    if front.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f"base_model_relation must be one of {RELATIONS}")
    if "license_name" in front and front.get("license") != "other":
        errors.append("license_name goes with license: other")
    names = front.get("base_model", [])
    named = names if isinstance(names, list) else [names]
    return errors + [f"{name} is no model id" for name in named if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._route()

        def do_GET(self) -> None:
            self._route()

        def do_POST(self) -> None:
            self._route()

        def do_PUT(self) -> None:
            self._route()

        def _route(self) -> None:
            """Hand the request to the first row whose method and path fit."""
            self.body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
            path, _, self.query = self.path.partition("?")
            for prefix, (status, reason) in hub.refused.items():
                if path.startswith(prefix):
                    return self._send(status, json.dumps({"error": reason}).encode(), {"X-Error-Message": reason})
            method = "GET" if self.command == "HEAD" else self.command
            routes: list[tuple[str, str, Callable[..., None]]] = [
                ("GET", "/api/whoami-v2", self._whoami),
                ("POST", "/api/repos/create", self._create),
                ("POST", "/api/validate-yaml", self._validate),
                ("GET", r"/api/models/([^/]+/[^/]+?)(?:/revision/[^/]+)?", self._info),
                ("GET", r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", self._tree),
                ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
                ("POST", r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self._preupload),
                ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
                ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
                ("PUT", r"/objects/([0-9a-f]{64})", self._receive),
                ("GET", r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", self._file),
            ]
            for wanted, pattern, answer in routes:
                match = re.fullmatch(pattern, path)
                if match and method == wanted:
                    if match.groups() and "/" in match[1] and match[1] not in hub.repositories:
                        break
                    return answer(*match.groups())
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _whoami(self) -> None:
            if hub.account is None:
                return self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return self._send_json(hub.account)

        def _create(self) -> None:
            asked = json.loads(self.body)
            repository = f"{asked['organization']}/{asked['name']}"
            first = next(iter(hub.repositories.values()))
            hub.repositories.setdefault(repository, first.with_name(asked["name"])).mkdir(exist_ok=True)
            if asked.get("visibility") == "private":
                hub.private.add(repository)
            self._send_json({"url": f"{hub.url}/{repository}", "id": repository})

        def _validate(self) -> None:
            errors = [{"message": message} for message in check_card(json.loads(self.body)["content"])]
            self._send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

        def _info(self, repository: str) -> None:
            folder = hub.repositories[repository]
            siblings = [_sibling(folder, file) for file in _files(folder)]
            private = repository in hub.private
            self._send_json({"id": repository, "sha": SHA, "private": private, "siblings": siblings})

        def _tree(self, repository: str, start: str) -> None:
            folder = hub.repositories[repository]
            inside = [file for file in _files(folder) if file.startswith(start)]
            if start and not inside:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self._send_json([{"type": "file", "path": file, **_sibling(folder, file)} for file in inside])

        def _branch(self, _: str, name: str) -> None:
            there = name in hub.branches
            hub.branches.add(name)
            self._send_json({}, 409 if there else 200)

        def _preupload(self, repository: str) -> None:
            folder, ways = hub.repositories[repository], []
            for file in json.loads(self.body)["files"]:
                large, here = file["path"].endswith(".safetensors"), folder / file["path"]
                way = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                ways.append({**way, "oid": _oid(here.read_bytes(), large=large)} if here.exists() else way)
            self._send_json({"files": ways})

        def _batch(self, repository: str) -> None:
            there = hub.objects.keys() | {_oid(path.read_bytes(), large=True) for path in _weights(hub, repository)}
            objects = []
            for entry in json.loads(self.body)["objects"]:
                way = {"actions": {"upload": {"href": f"{hub.url}/objects/{entry['oid']}"}}}
                objects.append({**entry, **({} if entry["oid"] in there else way)})
            self._send_json({"transfer": "basic", "objects": objects})

        def _receive(self, oid: str) -> None:
            assert _oid(self.body, large=True) == oid
            with hub.lock:  # several come at once
                if hub.accepts is not None and len(hub.sent) >= hub.accepts:
                    return self._send(507, b"the disk is full", {})
                hub.objects[oid] = self.body
                hub.sent.append(len(self.body))
            return self._send(200, b"", {})

        def _commit(self, repository: str, branch: str) -> None:
            folder = hub.repositories[repository]
            commit: dict[str, Any] = {"branch": branch, "pull_request": "create_pr=1" in self.query}
            commit |= {"files": {}, "deleted": []}
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    commit["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    commit["files"][value["path"]] = hub.objects.get(value["oid"])
                elif line["key"] == "deletedFile":
                    commit["deleted"].append(value["path"])
            hub.commits.append(commit)
            if branch == "main" and not commit["pull_request"]:
                for name in commit["deleted"]:
                    (folder / name).unlink()
                for name, content in commit["files"].items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(content)
            where = f"{hub.url}/{repository}"
            told = {"commitUrl": f"{where}/commit/{SHA}", "commitOid": SHA}
            if commit["pull_request"]:
                told["pullRequestUrl"] = f"{where}/discussions/1"
            self._send_json(told)

        def _file(self, repository: str, name: str) -> None:
            folder = hub.repositories[repository]
            if name not in _files(folder):
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
            content = (folder / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None:
                return self._send(200, content, headers, name)
            start, stop = int(asked[1]), int(asked[2]) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            return self._send(206, content[start:stop], headers, name, start)

        def _send_json(self, data: object, status: int = 200) -> None:
            self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

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

    return Handler


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _weights(hub: Hub, repository: str) -> list[Path]:
    return list(hub.repositories[repository].rglob("*.safetensors"))


def _sibling(folder: Path, file: str) -> dict[str, object]:
    content = (folder / file).read_bytes()
    return {"rfilename": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest(), "blobId": file}


def _oid(content: bytes, *, large: bool) -> str:
    """The hash by which the Hub knows a file: that of its bytes where it is large, else that of its git blob."""
    if large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
