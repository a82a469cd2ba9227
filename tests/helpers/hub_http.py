"""The HTTP side of the local Hub (`hub_server.py`): which request is which call, faults, and how errors are sent."""

import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", body: Any = None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


NAME = r"(?P<repo_id>[\w.-]+/[\w.-]+)"


def handler(hub: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do(self) -> None:
            parts = urlsplit(self.path)
            request = f"{self.command} {unquote(parts.path)}"
            body = self.body()
            with hub.lock:
                hub.requests.append(request)
            fault = hub.fault_for(request)
            if fault is not None and fault.how == "drop":
                return self.hang_up()
            if fault is not None and callable(fault.how):
                fault.how()
                fault = None
            if fault is not None and fault.how != "lose":
                return self.answer(fault.how, {"error": "out of order"}, fault.headers)
            try:
                with hub.lock:
                    status, answer, headers = self.route(parts.path, parse_qs(parts.query), body)
            except Refusal as refusal:
                headers = {
                    "X-Error-Message": refusal.message,
                    **({"X-Error-Code": refusal.code} if refusal.code else {}),
                }
                status, answer = refusal.status, refusal.body or {"error": refusal.message}
            if fault is not None:
                return self.hang_up()
            if self.headers.get("Accept") == "text/plain" and isinstance(answer, dict) and answer.get("errors"):
                answer = "\n".join(error["message"] for error in answer["errors"]).encode()
            self.answer(status, answer, headers)

        do_GET = do_HEAD = do_POST = do_PUT = do

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.close()

        def answer(self, status: int, content: Any, headers: Mapping[str, str]) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        @property
        def token(self) -> str | None:
            given = self.headers.get("Authorization", "")
            return given.removeprefix("Bearer ") if given.startswith("Bearer ") else None

        def route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, Any, dict[str, str]]:
            pull_request = query.get("create_pr") == ["1"]

            def match(method: str, pattern: str) -> dict[str, str] | None:
                found = re.fullmatch(pattern, path)
                right = method == self.command or (method == "GET" and self.command == "HEAD")
                return {k: unquote(v) for k, v in found.groupdict().items()} if found and right else None

            def given() -> Any:
                return json.loads(body)

            model = rf"/api/models/{NAME}"
            rev = r"(?P<revision>[^/]+)"
            if match("GET", "/api/whoami-v2") is not None:
                return 200, hub.whoami(self.token), {}
            if match("POST", "/api/repos/create") is not None:
                return 200, hub.create(given(), self.token), {}
            if match("POST", "/api/validate-yaml") is not None:
                return 200, hub.validate(given()), {}
            if (m := match("GET", model)) is not None:
                return 200, hub.info(m["repo_id"], "main", self.token), {}
            if (m := match("GET", rf"{model}/revision/{rev}")) is not None:
                return 200, hub.info(m["repo_id"], m["revision"], self.token), {}
            if (m := match("GET", rf"{model}/tree/{rev}")) is not None:
                return 200, hub.tree(m["repo_id"], m["revision"], self.token), {}
            if (m := match("PUT", rf"{model}/settings")) is not None:
                return 200, hub.settings(m["repo_id"], given(), self.token), {}
            if (m := match("POST", rf"{model}/branch/(?P<name>[^/]+)")) is not None:
                return 200, hub.branch(m["repo_id"], m["name"], self.token), {}
            if (m := match("POST", rf"{model}/preupload/{rev}")) is not None:
                return 200, hub.preupload(m["repo_id"], m["revision"], given(), self.token, pull_request), {}
            if (m := match("POST", rf"{model}/commit/{rev}")) is not None:
                lines = [json.loads(line) for line in body.splitlines()]
                return 200, hub.commit(m["repo_id"], m["revision"], lines, self.token, pull_request), {}
            if (m := match("POST", rf"/{NAME}\.git/info/lfs/objects/batch")) is not None:
                return 200, hub.lfs_batch(m["repo_id"], given(), self.token), {}
            if (m := match("POST", rf"/{NAME}\.git/info/lfs/objects/verify")) is not None:
                return 200, hub.verify(m["repo_id"], given(), self.token), {}
            storage = rf"/storage/{NAME}/(?P<oid>[0-9a-f]{{64}})/(?P<size>\d+)"
            if (m := match("PUT", storage)) is not None:
                hub.store(m["repo_id"], m["oid"], int(m["size"]), body)
                return 200, {}, {}
            if (m := match("PUT", rf"{storage}/(?P<part>\d+)")) is not None:
                hub.parts[m["oid"], int(m["part"])] = body
                return 200, {}, {"ETag": hashlib.md5(body).hexdigest()}
            if (m := match("POST", rf"{storage}/complete")) is not None:
                return 200, hub.complete(m["repo_id"], m["oid"], int(m["size"]), given()), {}
            if (m := match("GET", storage)) is not None:
                return 200, hub.repos[m["repo_id"]].storage[m["oid"]], {}
            if (m := match("GET", rf"/{NAME}/resolve/{rev}/(?P<file>.+)")) is not None:
                return self.resolve(m["repo_id"], m["revision"], m["file"])
            if path != "/api/agent-harnesses":
                hub.unknown.append(f"{self.command} {path}")
            raise Refusal(404, "Not found")

        def resolve(self, repo_id: str, revision: str, name: str) -> tuple[int, Any, dict[str, str]]:
            repo, commit = hub.repo(repo_id, self.token), hub.commit_of(repo_id, revision, self.token)
            if repo.gated and hub.account(self.token) is None:
                raise Refusal(401, f"Access to model {repo_id} is restricted.", "GatedRepo")
            blob = commit.files.get(name)
            if blob is None:
                raise Refusal(404, "Entry not found", "EntryNotFound")
            headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{blob.oid}"'}
            if not blob.lfs:
                return 200, blob.content, headers
            repo.storage.setdefault(blob.sha256, blob.content)
            size = str(len(blob.content))
            large = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": size}
            return (
                302,
                b"",
                {**headers, **large, "Location": f"{hub.storage_url}/storage/{repo_id}/{blob.sha256}/{size}"},
            )

    return Handler
