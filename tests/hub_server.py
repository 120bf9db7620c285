# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A Hub on 127.0.0.1: as much of its interface as huggingface_hub uses to publish and load models, and datasets to load
data sets. These are repositories whose id begins with `datasets/`.

Repositories with commits, branches, tags and pull requests; large files by LFS; tokens and private repositories; faults
on demand. Clients need HF_HUB_DISABLE_XET=1, as the server has no Xet storage.
"""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".parquet")
DATASETS = "datasets/"
FIRST_FILES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass
class Commit:
    files: dict[str, bytes]
    title: str
    parent: str | None = None


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256

    def commit(self, ref: dict[str, str], name: str, files: dict[str, bytes], title: str) -> str:
        parent = ref.get(name)
        sha = hashlib.sha1(f"{len(self.commits)} {parent} {title}".encode()).hexdigest()
        self.commits[sha] = Commit(files, title, parent)
        ref[name] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, pull request or commit stands for."""
        refs = {**self.tags, **{f"refs/heads/{k}": v for k, v in self.branches.items()}, **self.pulls, **self.branches}
        return refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)].files


@dataclass
class Fault:
    """What happens to the next `times` requests of a method to a path that holds `part`.

    With `status`, that answer; with `stalls`, none; without, the connection ends after `after` bytes of the body.
    """

    method: str
    part: str
    status: int | None = None
    after: int = 0
    stalls: bool = False
    times: int = 1


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    size: int  # bytes of the body that came
    authorized: bool


class HubError(Exception):
    def __init__(self, status: int, code: str | None = None, message: str | None = None, content: dict | None = None):
        self.status, self.code, self.message = status, code, message
        self.content = {"error": message or code} if content is None else content


class Hub:
    """The state of the server; tests read and change it directly."""

    def __init__(self):
        self.address = ""
        self.users = {}  # by token
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def add(self, repo_id: str, files: dict[str, bytes] | Path | None = None, **options) -> Repository:
        """A repository with a first commit, of files or of a folder's files."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repository = self.repositories[repo_id] = Repository(**options)
        repository.commit(repository.branches, "main", {**FIRST_FILES, **(files or {})}, "initial commit")
        return repository

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables of a client process with its caches in `home`."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        variables |= {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return variables | {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})

    def sent(self, method: str, part: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and fault.part in path:
                fault.times -= 1
                return fault


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def tree_entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
    if is_lfs(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def folder_entry(path: str) -> dict:
    return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle_request(self):
        hub, parts = self.hub, urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        fault = hub.fault(self.command, path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        drops_upload = fault is not None and fault.status is None and self.command in ("PUT", "POST")
        body = self.read_body(fault.after if drops_upload else None)
        hub.requests.append(Request(self.command, path, self.headers.get("Range"), len(body), bool(token)))
        if drops_upload:
            if fault.stalls:
                self.connection.recv(1)  # returns when the client has gone
            self.close_connection = True
            return
        try:
            if fault is not None and fault.status is not None:
                raise HubError(fault.status, message="Internal Error")
            if token and token not in hub.users:
                raise HubError(401, message="Invalid credentials in Authorization header")
            self.user = hub.users.get(token)
            with hub.lock:
                status, headers, content = self.route(path, body)
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            headers["Content-Type"] = "application/json"
            status, content = error.status, json.dumps(error.content).encode()
        self.reply(status, headers, content, fault.after if fault is not None and fault.status is None else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self, limit: int | None) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if limit is not None and len(body) >= limit:
                    return body[:limit]
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(limit, length))

    def reply(self, status: int, headers: dict, content: bytes, limit: int | None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:limit])
            self.close_connection |= limit is not None

    def log_message(self, *arguments):
        pass

    def route(self, path: str, body: bytes) -> tuple[int, dict, bytes]:
        for method, pattern, name in ROUTES:
            if method in (self.command, "GET" if self.command == "HEAD" else None) and (
                match := re.fullmatch(pattern, path)
            ):
                arguments = match.groupdict()
                if "repo" in arguments:
                    arguments["repo_id"] = arguments.pop("repo")
                    arguments["repository"] = self.repository(arguments["repo_id"], writes=name in WRITES)
                result = getattr(self, name)(body=body, **arguments)
                if isinstance(result, tuple):
                    return result
                return 200, {"Content-Type": "application/json"}, json.dumps(result).encode()
        raise HubError(404, message=f"{self.command} {path} is no route of this server")

    def repository(self, repo_id: str, writes: bool) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        owns = self.user is not None and self.user == repo_id.split("/")[-2]
        if repository is None or (repository.private and not owns):
            raise HubError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if repository.gated and not owns and "/api/" not in self.path:
            raise HubError(403, "GatedRepo", "Access to this model is restricted")
        if writes and not owns and "create_pr" not in self.query:
            raise HubError(403, message="You don't have write access to this repository")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        if (sha := repository.resolve(revision)) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def whoami(self, body):
        if self.user is None:
            raise HubError(401, message="Invalid username or password.")
        access = {"displayName": "test", "role": "write"}
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    def validate_yaml(self, body):
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            yaml.safe_load(match.group(1) if match else "")
        except yaml.YAMLError:
            content = {"errors": [{"message": "YAML can't be parsed"}], "warnings": []}
            raise HubError(400, message="Invalid metadata", content=content) from None
        return {"errors": [], "warnings": []}

    def create_repository(self, body):
        options = json.loads(body)
        if self.user is None:
            raise HubError(401, message="Invalid username or password.")
        owner = options.get("organization") or self.user
        repo_id = f"{owner}/{options['name']}"
        url = {"url": f"{self.hub.address}/{repo_id}", "name": repo_id}
        if owner != self.user:
            message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise HubError(403, message=message)
        if repo_id in self.hub.repositories:
            message = "You already created this model repo"
            raise HubError(409, message=message, content={**url, "error": message})
        private = options.get("visibility") == "private" or bool(options.get("private"))
        self.hub.add(repo_id, private=private)
        return url

    def info(self, body, repo_id, repository, revision="main"):
        commit = self.commit_of(repository, revision)
        repo_id = repo_id.removeprefix(DATASETS)
        return {
            "id": repo_id, "modelId": repo_id, "sha": commit, "private": repository.private, "tags": [],
            "gated": "auto" if repository.gated else False, "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": path} for path in repository.commits[commit].files],
        }  # fmt: skip

    def tree(self, body, repo_id, repository, revision, folder=None):
        files = repository.commits[self.commit_of(repository, revision)].files
        under = f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(under)}
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist")
        folders = {under + path.removeprefix(under).split("/")[0] for path in inside} - set(inside)
        if self.query.get("recursive") != ["true"]:
            inside = {path: content for path, content in inside.items() if "/" not in path.removeprefix(under)}
        return [folder_entry(path) for path in folders] + [tree_entry(*item) for item in inside.items()]

    def paths_info(self, body, repo_id, repository, revision):
        files = repository.commits[self.commit_of(repository, revision)].files
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = parse_qs(body.decode())["paths"]
        return [tree_entry(path, files[path]) for path in paths if path in files]

    def refs(self, body, repo_id, repository):
        def listed(refs, prefix):
            return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in refs.items()]

        branches, tags = listed(repository.branches, "refs/heads/"), listed(repository.tags, "refs/tags/")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": listed(repository.pulls, "")}

    def commits(self, body, repo_id, repository, revision):
        result, sha = [], self.commit_of(repository, revision)
        while sha is not None:
            commit = repository.commits[sha]
            result.append({"id": sha, "authors": [], "date": DATE, "title": commit.title, "message": ""})
            sha = commit.parent
        return result

    def create_branch(self, body, repo_id, repository, branch):
        if branch in repository.branches:
            raise HubError(409, message="Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self.commit_of(repository, start)
        return {}

    def delete_branch(self, body, repo_id, repository, branch):
        del repository.branches[branch]
        return {}

    def create_tag(self, body, repo_id, repository, revision):
        repository.tags[json.loads(body)["tag"]] = self.commit_of(repository, revision)
        return {}

    def preupload(self, body, repo_id, repository, revision):
        present = repository.commits[self.commit_of(repository, revision)].files
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            if path in present:
                entry = tree_entry(path, present[path])
                answer["oid"] = entry["lfs"]["oid"] if is_lfs(path) else entry["oid"]
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, body, repo_id, repository):
        batch = json.loads(body)
        if self.user is None or "ref" in batch and self.user != repo_id.split("/")[0]:  # without: of a pull request
            raise HubError(403, message="You don't have write access to this repository")
        objects = []
        for item in batch["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repository.objects:
                href = f"{self.hub.address}/lfs/{repo_id}/{item['oid']}"
                verify = f"{self.hub.address}/api/models/{repo_id}/lfs-verify"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body, repo_id, oid):
        """As of a signed address of a storage service: no token."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message="The content's checksum differs")
        self.hub.repositories[repo_id].objects[oid] = body
        return 200, {}, b""

    def lfs_verify(self, body, repo_id, repository):
        item = json.loads(body)
        if len(repository.objects.get(item["oid"], b"")) != item["size"]:
            raise HubError(404, message="Object not found")
        return {}

    def make_commit(self, body, repo_id, repository, revision):
        lines = [json.loads(line) for line in body.splitlines()]
        header, operations = lines[0]["value"], lines[1:]
        if "create_pr" in self.query:
            refs, name = repository.pulls, f"refs/pr/{len(repository.pulls) + 1}"
            refs[name] = self.commit_of(repository, revision)
        else:
            refs = repository.pulls if revision in repository.pulls else repository.branches
            name = revision
            if name not in refs:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if header.get("parentCommit", refs[name]) != refs[name]:
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[refs[name]].files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in repository.objects:
                    raise HubError(400, message=f"LFS object {value['oid']} is missing")
                files[value["path"]] = repository.objects[value["oid"]]
            else:
                del files[value["path"]]
        sha = repository.commit(refs, name, files, header["summary"])
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{repo_id}/commit/{sha}"}
        if refs is repository.pulls:
            answer["pullRequestUrl"] = f"{self.hub.address}/{repo_id}/discussions/{name.split('/')[-1]}"
        return answer

    def download(self, body, repo_id, repository, revision, file):
        commit = self.commit_of(repository, revision)
        content = repository.commits[commit].files.get(file)
        if content is None:
            raise HubError(404, "EntryNotFound", "Entry not found")
        entry = tree_entry(file, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": len(content)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            if start >= len(content):
                raise HubError(416, message="Range Not Satisfiable")
            return 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]
        return 200, headers, content


API, REPO = "/api/(models/)?", rf"(?P<repo>({DATASETS})?[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create_repository"),
    ("GET", API + REPO, "info"),
    ("GET", API + REPO + "/revision/(?P<revision>.+)", "info"),
    ("GET", API + REPO + "/tree/(?P<revision>refs/pr/[0-9]+|[^/]+)(/(?P<folder>.+))?", "tree"),
    ("POST", API + REPO + "/paths-info/(?P<revision>.+)", "paths_info"),
    ("GET", API + REPO + "/refs", "refs"),
    ("GET", API + REPO + "/commits/(?P<revision>.+)", "commits"),
    ("POST", API + REPO + "/branch/(?P<branch>.+)", "create_branch"),
    ("DELETE", API + REPO + "/branch/(?P<branch>.+)", "delete_branch"),
    ("POST", API + REPO + "/tag/(?P<revision>.+)", "create_tag"),
    ("POST", API + REPO + "/preupload/(?P<revision>.+)", "preupload"),
    ("POST", "/" + REPO + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", API + REPO + "/lfs-verify", "lfs_verify"),
    ("PUT", "/lfs/(?P<repo_id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("POST", API + REPO + "/commit/(?P<revision>.+)", "make_commit"),
    ("GET", "/" + REPO + "/resolve/(?P<revision>refs/pr/[0-9]+|[^/]+)/(?P<file>.+)", "download"),
]
WRITES = ("create_branch", "delete_branch", "create_tag", "preupload", "make_commit")


@contextmanager
def serve_hub():
    """Runs a server with an empty [`Hub`] and yields that."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
