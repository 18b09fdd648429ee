"""A Hugging Face hub made by hand: it keeps the files of each repository, and refuses whom it is told to."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = {
    "hf_planted_writer": {"role": "write"},
    "hf_planted_reader": {"role": "read"},
    "hf_planted_scoped": {"role": "fineGrained"},
}
ORGS = [{"name": "team", "roleInOrg": "write"}, {"name": "full"}, {"name": "watched", "roleInOrg": "read"}]
FORBIDDEN = "full/model"  # as all that is to be made there


@dataclass
class FakeHub:
    """What huggingface_hub asks before and in a push. Files that end with .safetensors come by LFS."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    commits: int = 0
    is_down: bool = False  # it then ends connections without an answer
    scopes: list[dict[str, Any]] = field(default_factory=list)  # of the fine-grained token
    account: Any = None  # what whoami answers, if not the token's
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by their SHA-256

    def answer(self, token: str, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, content and headers for a request."""
        if path.startswith("/lfs/"):  # an address of its own, without a token
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        if token not in TOKENS:
            return 401, {"error": f"Invalid token {token}"}, {}
        if FORBIDDEN in path or (path == "/api/repos/create" and json.loads(body)["organization"] == "full"):
            return 403, {"error": f"You don't have the rights,\n\x1b[31m{token}"}, {}
        if path == "/api/whoami-v2":
            return 200, self._account(TOKENS[token]), {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if re.fullmatch(r"/.+/.+\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]}, {}
        name, verb = re.fullmatch(r"/api/models/([^/]+/[^/]+)/?([a-z]*).*", path).groups()  # pyright: ignore
        return self._of_repo(name, verb, body) if name in self.repos else (404, {}, {"X-Error-Code": "RepoNotFound"})

    def _account(self, access: dict[str, Any]) -> Any:
        if self.account is not None:
            return self.account
        if access["role"] == "fineGrained":
            access = access | {"fineGrained": {"canReadGatedRepos": True, "global": [], "scoped": self.scopes}}
        return {"name": "me", "orgs": ORGS, "auth": {"type": "access_token", "accessToken": access}}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}, {}
        self.repos[name] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        if asked.get("visibility") == "private":
            self.private.add(name)
        return 200, {"url": f"{self.url}/{name}"}, {}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        actions = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}
        return asked | ({} if asked["oid"] in self.objects else {"actions": actions})

    def _of_repo(self, name: str, verb: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        files = self.repos[name]
        if verb == "tree":
            return 200, [{"type": "file", "path": path, "size": 1, "oid": "0"} for path in files], {}
        if verb == "preupload":
            asked = json.loads(body)["files"]
            lfs = {each["path"]: each["path"].endswith(".safetensors") for each in asked}
            modes = [
                {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                for path, large in lfs.items()
            ]
            return 200, {"files": modes}, {}
        if verb == "commit":
            for line in map(json.loads, body.splitlines()):
                self._apply(files, line["key"], line["value"])
            self.commits += 1
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{40 * 'a'}", "commitOid": 40 * "a"}, {}
        return 200, {"id": name, "private": name in self.private, "sha": 40 * "a", "siblings": [], "tags": []}, {}

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.objects[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve one on loopback."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.is_down:
                self.close_connection = True
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content, headers = hub.answer(token, self.command, self.path.partition("?")[0], body)
            data = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = do_GET  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
