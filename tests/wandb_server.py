"""A stand-in for a Weights & Biases server, on loopback, for the real client to talk to.

It answers what wandb 0.31 asks (GraphQL, the file stream, uploads) and keeps what it receives: ``runs[id]``. History
lines are placed where the client says they go, so that a wrong offset overwrites or repeats lines."""

from __future__ import annotations

import gzip
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

KEY = "0123456789" * 4  # wandb takes keys of 40 characters
ENTITY = "someone"


@dataclass
class ReceivedRun:
    name: str = ""
    notes: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: str = "{}"
    files: dict[str, bytes] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)  # the exit code of every session that was closed


class StandIn(http.server.ThreadingHTTPServer):
    """``mood``: well | refuses (401 to everything) | hangs (accepts and never answers, until it is closed).
    ``dies_at``: the history line before which it dies: it has the lines up to there, and hangs without a word of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, ReceivedRun] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []  # saved workspaces
        self.mood, self.dies_at = "well", sys.maxsize
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def env(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no error of the server's."""

    def answer(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The ``data`` of a GraphQL response."""
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}
        if operation == "UpsertBucket":
            return {"upsertBucket": {"bucket": self._upsert(asked), "inserted": True}}
        if operation == "RunResumeStatus":
            return {"model": self._resume_status(asked["name"])}
        if operation == "CreateRunFiles":
            places = [{"name": n, "uploadUrl": f"{self.url}/upload/{asked['run']}/{n}"} for n in asked["files"]]
            return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": places}}
        if operation == "UpsertView2":
            self.views.append(json.loads(asked["spec"]))
            return {"upsertView": {"view": {"id": "v", "name": asked["name"]}, "inserted": True}}
        return self._artifact(operation, asked)

    def _upsert(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(asked["name"], ReceivedRun())
        run.notes = asked["notes"] or run.notes
        run.config, run.name = asked["config"] or run.config, asked["displayName"] or run.name
        project = {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": ENTITY}}
        return {"id": asked["name"], "name": asked["name"], "displayName": run.name, "config": run.config} | {
            "project": project,
            "historyLineCount": len(run.history),
        }

    def _resume_status(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        bucket = {"id": name, "name": name, "displayName": run.name, "tags": [], "config": run.config}
        bucket |= {"historyLineCount": len(run.history), "eventsLineCount": 0, "logLineCount": 0}
        bucket |= {"historyTail": json.dumps([json.dumps(line) for line in run.history[-1:]]), "eventsTail": "[]"}
        bucket |= {"summaryMetrics": json.dumps(run.summary), "wandbConfig": json.dumps({"t": 1})}
        return {"id": "p", "name": "project", "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}

    def _artifact(self, operation: str, asked: dict[str, Any]) -> dict[str, Any]:
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":
            given = asked["input"]
            self.artifacts.append(given | {"files": {}, "committed": False})
            made = {"id": str(len(self.artifacts) - 1), "state": "PENDING", "artifactSequence": {"id": "s"}}
            return {"createArtifact": {"artifact": made | {"versionIndex": 0, "digest": given["digest"]}}}
        if operation in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            number = asked.get("artifactID") or asked["artifactManifestID"]
            place = {"id": "f", "uploadUrl": f"{self.url}/artifact/{number}/manifest", "uploadHeaders": []}
            answer = {"artifactManifest": {"id": number, "file": place}}
            return {operation[0].lower() + operation[1:]: answer}
        if operation == "CreateArtifactFiles":
            nodes = []
            for file in asked["input"]["artifactFiles"]:
                url = f"{self.url}/artifact/{file['artifactID']}/{file['name']}"
                node = {"uploadUrl": url, "uploadHeaders": [], "storagePath": file["name"], "uploadMultipartUrls": None}
                nodes.append({"node": node | {"artifact": {"id": file["artifactID"]}}})
            return {"createArtifactFiles": {"files": {"edges": nodes}}}
        if operation == "CommitArtifact":
            self.artifacts[int(asked["artifactID"])]["committed"] = True
            return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": ""}}}
        return {}

    def stream(self, run: ReceivedRun, files: dict[str, Any]) -> None:
        """One request of the file stream: lines of history, and the summary."""
        lines = files.get("wandb-history.jsonl")
        if lines:
            at, content = lines["offset"], [json.loads(line) for line in lines["content"]]
            run.history[at : at + len(content)] = content
            if len(run.history) > self.dies_at:
                del run.history[self.dies_at :]
                self.mood = "hangs"
                self.closing.wait()
        if "wandb-summary.json" in files:
            run.summary = json.loads(files["wandb-summary.json"]["content"][-1])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._respond(self._body())

    do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _respond(self, body: bytes) -> None:
        if self.server.mood == "hangs":
            self.server.closing.wait()
            return
        status, answer = 200, {}
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        upload = re.fullmatch(r"/upload/([^/]+)/(.+)", self.path)
        if self.server.mood == "refuses":
            status, answer = 401, {"errors": [{"message": "user is not logged in"}]}
        elif self.path == "/graphql":
            asked = json.loads(body)
            name = asked.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            answer = {"data": self.server.answer(name, asked.get("variables") or {})}
        elif stream:
            sent, run = json.loads(body), self.server.runs[stream[1]]
            self.server.stream(run, sent.get("files") or {})
            if sent.get("complete"):
                run.finished.append(sent["exitcode"])
        elif artifact := re.fullmatch(r"/artifact/(\d+)/(.+)", self.path):
            self.server.artifacts[int(artifact[1])]["files"][artifact[2]] = body
        elif upload:
            self.server.runs[upload[1]].files[upload[2]] = body
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
