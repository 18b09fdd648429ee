"""A server of W&B made by hand: one run, whose history it keeps; tables and files it refuses."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeWandb:
    """What the library asks when it begins a run and when it goes on, and what it streams."""

    def __init__(self) -> None:
        self.runs: list[str] = []  # the id of each start
        self.lines: list[tuple[int, str]] = []  # of the history: place and JSON

    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in self.lines]

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            history = (body.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.lines += list(enumerate(history["content"], start=history["offset"]))
            return {"limits": {}}
        query = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
        project = {"id": "P", "name": "additions", "entity": {"id": "E", "name": "team"}}
        match query[1] if query else "":
            case "Viewer":  # who logs in
                return {"data": {"viewer": {"id": "U", "entity": "team", "username": "u", "flags": "{}"}}}
            case "RunResumeStatus":
                return {"data": {"model": project | {"bucket": self._resumed() if self.runs else None}}}
            case "UpsertBucket":
                if body["variables"].get("config") is not None and body["variables"].get("displayName"):
                    self.runs.append(body["variables"]["name"])
                bucket = {"id": "X", "name": body["variables"]["name"], "displayName": "run", "project": project}
                return {
                    "data": {"upsertBucket": {"bucket": bucket | {"config": "{}"}, "inserted": len(self.runs) == 1}}
                }
        return {"data": {}, "errors": [{"message": "not here"}]}

    def _resumed(self) -> dict[str, Any]:
        none = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        tail = json.dumps([line for _, line in self.lines[-1:]])
        count = {"historyLineCount": len(self.lines), "historyTail": tail}
        return none | count | {"id": "X", "name": self.runs[0], "tags": [], "wandbConfig": '{"t": 1}'}


@contextmanager
def serving(server: FakeWandb) -> Iterator[str]:
    """The address where it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None: ...

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
            answer = json.dumps(server.answer(self.path, json.loads(data))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}"
        finally:
            listening.shutdown()
            thread.join()
