"""A local server that speaks the Hub's API, for the real client: accounts, repositories, git-like commits, LFS.

It is strict where the Hub is: a file whose hash or size isn't what was announced, a commit over another parent, a card
with wrong metadata, or a token without the right is an error. What it doesn't know it answers by 404 and notes in
`unknown`. It never answers a write with anything visible half done.

    with HubServer() as hub:
        hub.add_account("me", "hf_write", "write")
        HfApi(endpoint=hub.url, token="hf_write").create_repo("me/x")

`hub.fail("PUT /storage", times=2, how="drop")` breaks requests: "drop" closes the connection before the request is
looked at, "lose" does what was asked and closes the connection instead of answering, a number is a status, and a
function is called before the request is.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

import yaml
from hub_http import Refusal, handler

LFS_ENDINGS = (".safetensors", ".png", ".bin", ".gguf")
LFS_SIZE = 10 * 2**20
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"
# Enough of the Hub's list for the tests; see docs/hub/repositories-licenses.md of hub-docs.
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "odc-by", "llama3.1", "gemma", "other", "unknown"}


@dataclass
class Blob:
    """A file: its content, or of a large one the pointer to it."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What git calls it. Of a large file git only sees the pointer."""
        text = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool = False
    gated: Any = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)  # large files that arrived, committed or not

    def commit(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        history = self.branches.setdefault(branch, [])
        parent = history[-1].sha if history else None
        listing = json.dumps([parent, title, sorted((name, blob.oid) for name, blob in files.items())])
        history.append(Commit(hashlib.sha1(listing.encode()).hexdigest(), parent, title, files))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.sha == revision), None)

    @property
    def files(self) -> dict[str, Blob]:
        """Those of the newest commit of main."""
        return self.branches["main"][-1].files


@dataclass
class Fault:
    pattern: str
    times: int
    how: Any
    headers: dict[str, str]


class HubServer:
    """See the module."""

    def __init__(self, multipart: int | None = None):
        self.multipart = multipart  # large files of more bytes are sent in parts of so many
        self.accounts: dict[str, dict[str, Any]] = {}  # token to what whoami says
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.faults: list[Fault] = []
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage_url = f"http://localhost:{self.server.server_port}"  # another host, as the Hub's

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    # What tests arrange and look at.

    def add_account(
        self, name: str, token: str, role: str, orgs: Mapping[str, str] | None = None, **fine: Any
    ) -> None:
        access = {"displayName": f"{name}'s token", "role": role, **({"fineGrained": fine} if fine else {})}
        members = [{"name": org, "type": "org", "roleInOrg": in_org} for org, in_org in (orgs or {}).items()]
        auth = {"type": "access_token", "accessToken": access}
        self.accounts[token] = {"type": "user", "name": name, "orgs": members, "auth": auth}

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        self.repos[repo_id] = repo = Repo(private=private)
        blobs = {name: Blob(content, name.endswith(LFS_ENDINGS)) for name, content in (files or {}).items()}
        repo.commit("main", "initial commit", {".gitattributes": Blob(ATTRIBUTES, False), **blobs})
        return repo

    def fail(self, pattern: str, times: int = 1, how: Any = "drop", **headers: str) -> None:
        """Break the next `times` requests whose "METHOD /path" the pattern is found in."""
        self.faults.append(Fault(pattern, times, how, headers))

    def count(self, pattern: str) -> int:
        """Requests so far whose "METHOD /path" the pattern is found in."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    # Rights.

    def account(self, token: str | None) -> dict[str, Any] | None:
        if token is None:
            return None
        if token not in self.accounts:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def may_write(self, token: str | None, repo_id: str) -> None:
        account = self.account(token)
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        access, owner = account["auth"]["accessToken"], repo_id.split("/")[0]
        roles = {org["name"]: org["roleInOrg"] for org in account["orgs"]}
        allowed = owner == account["name"] or roles.get(owner) in ("write", "admin", "contributor")
        if access["role"] == "fineGrained":
            scopes = access["fineGrained"]["scoped"]
            named = [s for s in scopes if s["entity"]["name"] in (owner, repo_id) and "repo.write" in s["permissions"]]
            allowed = allowed and bool(named)
        if access["role"] == "read" or not allowed:
            raise Refusal(403, f"You don't have the rights to write to {repo_id}")

    def repo(self, repo_id: str, token: str | None) -> Repo:
        account, repo = self.account(token), self.repos.get(repo_id)
        names = [] if account is None else [account["name"], *(org["name"] for org in account["orgs"])]
        if repo is None or (repo.private and repo_id.split("/")[0] not in names):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    # Calls: each takes the parts of its path, the query, the body and the token, and returns what is sent as JSON.

    def whoami(self, token: str | None) -> Any:
        account = self.account(token)
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        return account

    def create(self, body: Any, token: str | None) -> Any:
        account = self.whoami(token)
        repo_id = f"{body.get('organization') or account['name']}/{body['name']}"
        self.may_write(token, repo_id)
        url = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo", body=url)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.add_repo(repo_id, private=private)
        return url

    def info(self, repo_id: str, revision: str, token: str | None) -> Any:
        repo, commit = self.repo(repo_id, token), self.commit_of(repo_id, revision, token)
        siblings = []
        for name, blob in sorted(commit.files.items()):
            entry: dict[str, Any] = {"rfilename": name, "size": len(blob.content), "blobId": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
            siblings.append(entry)
        return {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit.sha,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, repo_id: str, revision: str, token: str | None) -> Any:
        entries = []
        for name, blob in sorted(self.commit_of(repo_id, revision, token).files.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
            entries.append(entry)
        return entries

    def commit_of(self, repo_id: str, revision: str, token: str | None) -> Commit:
        commit = self.repo(repo_id, token).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def settings(self, repo_id: str, body: Any, token: str | None) -> Any:
        repo = self.repo(repo_id, token)
        self.may_write(token, repo_id)
        if "gated" in body:
            if body["gated"] not in ("auto", "manual", False):
                raise Refusal(400, "gated must be auto, manual or false")
            repo.gated = body["gated"]
        if "visibility" in body or "private" in body:
            repo.private = body.get("visibility") == "private" or bool(body.get("private"))
        return {}

    def branch(self, repo_id: str, name: str, token: str | None) -> Any:
        repo = self.repo(repo_id, token)
        self.may_write(token, repo_id)
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        repo.branches[name] = list(repo.branches["main"])
        return {}

    def validate(self, body: Any) -> Any:
        errors = card_errors(body["content"])
        if errors:
            raise Refusal(400, errors[0], body={"errors": [{"message": e} for e in errors], "warnings": []})
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id: str, revision: str, body: Any, token: str | None, pull_request: bool) -> Any:
        commit = self.commit_of(repo_id, revision, token)
        if not pull_request:
            self.may_write(token, repo_id)
        answers = []
        for entry in body["files"]:
            base64.b64decode(entry["sample"], validate=True)
            blob = commit.files.get(entry["path"])
            known = {} if blob is None else {"oid": blob.sha256 if blob.lfs else blob.oid}
            mode = "lfs" if is_large(entry["path"], entry["size"]) else "regular"
            answers.append({"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    def lfs_batch(self, repo_id: str, body: Any, token: str | None) -> Any:
        repo = self.repo(repo_id, token)
        self.whoami(token)
        if body["operation"] != "upload" or body["hash_algo"] != "sha256" or "basic" not in body["transfers"]:
            raise Refusal(422, "Unknown operation")
        objects = []
        for entry in body["objects"]:
            oid, size = entry["oid"], entry["size"]
            objects.append({"oid": oid, "size": size})
            if oid in repo.storage:
                continue
            href = f"{self.storage_url}/storage/{repo_id}/{oid}/{size}"
            actions: dict[str, Any] = {"upload": {"href": href}}
            if self.multipart is not None and size > self.multipart:
                number = -(-size // self.multipart)
                parts = {str(i + 1): f"{href}/{i + 1}" for i in range(number)}
                actions["upload"] = {
                    "href": f"{href}/complete",
                    "header": {"chunk_size": str(self.multipart), **parts},
                }
            actions["verify"] = {"href": f"{self.url}/{repo_id}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = actions
        return {"transfer": "basic", "objects": objects}

    def store(self, repo_id: str, oid: str, size: int, content: bytes) -> None:
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, f"The content is not the one announced as {oid} ({size} bytes)")
        self.repos[repo_id].storage[oid] = content

    def complete(self, repo_id: str, oid: str, size: int, body: Any) -> Any:
        parts = [self.parts.get((oid, part["partNumber"]), b"") for part in body["parts"]]
        tags = [hashlib.md5(part).hexdigest() for part in parts]
        if body["oid"] != oid or [part["etag"] for part in body["parts"]] != tags:
            raise Refusal(400, "The parts are not those that arrived")
        self.store(repo_id, oid, size, b"".join(parts))
        return {}

    def verify(self, repo_id: str, body: Any, token: str | None) -> Any:
        content = self.repo(repo_id, token).storage.get(body["oid"])
        if content is None or len(content) != body["size"]:
            raise Refusal(404, f"{body['oid']} did not arrive whole")
        return {}

    def commit(self, repo_id: str, revision: str, lines: list[Any], token: str | None, pull_request: bool) -> Any:
        """All of it or nothing: files are looked at before any is put in its place."""
        repo, head = self.repo(repo_id, token), self.commit_of(repo_id, revision, token)
        self.whoami(token)
        if not pull_request:
            self.may_write(token, repo_id)
        header = lines[0]["value"]
        if lines[0]["key"] != "header" or not header["summary"]:
            raise Refusal(400, "A commit begins with a header")
        if header.get("parentCommit", head.sha) != head.sha and not pull_request:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            files.update([_committed(line["key"], line["value"], repo)])
        if files == head.files:
            raise Refusal(400, "No files have been modified since last commit")
        if "README.md" in files and (errors := card_errors(files["README.md"].content.decode())):
            raise Refusal(400, f"Invalid metadata in README.md: {errors[0]}")
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        branch = f"refs/pr/{number}" if pull_request else revision
        repo.branches.setdefault(branch, list(repo.branches[revision]))
        made = repo.commit(branch, header["summary"], files)
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.url}/{repo_id}/commit/{made.sha}"}
        discussion = f"{self.url}/{repo_id}/discussions/{number}"
        return {**answer, **({"pullRequestUrl": discussion} if pull_request else {})}


def is_large(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_ENDINGS) or size > LFS_SIZE)


def _committed(key: str, value: Any, repo: Repo) -> tuple[str, Blob]:
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"], validate=True)
        if is_large(path, len(content)):
            raise Refusal(400, f"{path} must be sent as a large file")
        return path, Blob(content, False)
    if key == "lfsFile":
        content = repo.storage.get(value["oid"], b"")
        if value["algo"] != "sha256" or len(content) != value.get("size", -1) or not content:
            raise Refusal(400, f"{path} points to {value['oid']}, which did not arrive")
        return path, Blob(content, True)
    raise Refusal(400, f"{key} is not known")


def card_errors(text: str) -> list[str]:
    """What the Hub's specification forbids in a card's metadata; written apart from the package's own rules."""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return ["empty or missing yaml metadata in repo card"]
    try:
        head = yaml.safe_load(text[4:].split("\n---")[0])
    except yaml.YAMLError as error:
        return [f"bad yaml: {error}"]
    errors = []
    licenses = head.get("license", [])
    for licence in [licenses] if isinstance(licenses, str) else licenses:
        if licence not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}')
    for name in [*_listed(head.get("datasets")), *_listed(head.get("base_model"))]:
        if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", name):
            errors.append(f"{name!r} is not a valid repository name")
    if head.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" is not allowed')
    for model in head.get("model-index", []):
        for result in model["results"]:
            dataset, task = result.get("dataset", {}), result.get("task", {})
            if not (task.get("type") and dataset.get("type") and dataset.get("name")):
                errors.append('"model-index" results need task.type, dataset.type and dataset.name')
            for metric in result.get("metrics") or [{}]:
                if not metric.get("type") or not isinstance(metric.get("value"), int | float | str):
                    errors.append('"model-index" metrics need type and value')
    return errors


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
