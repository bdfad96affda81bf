"""A Hugging Face Hub in memory, on the loopback interface, for the genuine client.

It answers the requests that `huggingface_hub` sends to create, fill and read model repositories,
with the status codes, headers and error codes of the real Hub. Large files take the LFS way: a
batch request, an upload in one or several parts, and a redirect to their content when read.

    with LoopbackHub(tokens={"hf_user": "user"}) as hub:
        subprocess.run(..., env={**os.environ, "HF_ENDPOINT": hub.endpoint, ...})
"""

import base64
import dataclasses
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Json = dict | list

LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
PART_SIZE = 16_384
"""Largest upload in one request; the real Hub takes 5 GB, tests want to see several parts."""


@dataclass(frozen=True)
class Blob:
    """Content of one file."""

    content: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """A model repository with one branch, `main`."""

    name: str
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("initial commit", {})

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def commit(self, message: str, files: dict[str, Blob]) -> Commit:
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.head

    def at(self, revision: str) -> Commit:
        for commit in self.commits:
            if revision == commit.oid:
                return commit
        if revision == "main":
            return self.head
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class HubError(Exception):
    """An answer that is an error, in the way that the client understands."""

    def __init__(self, status: int, code: str | None, message: str, commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code
        if commit:
            self.headers["X-Repo-Commit"] = commit


@dataclass(frozen=True)
class Answer:
    """Status, body and headers of an answer."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Json, status: int = 200) -> "Answer":
        return cls(json.dumps(values).encode(), status, {"Content-Type": "application/json"})


@dataclass(frozen=True)
class Request:
    """What a handler needs of a request."""

    method: str
    path: str
    token: str | None
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class LoopbackHub:
    """The server and all that it stores.

    Args:
        tokens: User name per valid access token.
    """

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self._large_files: dict[str, bytes] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Content of large files comes from another host, as it does in the real world: the client
        # then stops at the redirect to read its headers, and sends no token to that host.
        self._content_host = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: Request) -> Answer:
        """Find the route of `request` and follow it."""
        self.requests.append(request)
        for method, pattern, handler in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in method.split():
                names = {
                    key: urllib.parse.unquote(value) for key, value in match.groupdict("").items()
                }
                return handler(self, request, **names)
        raise HubError(404, None, f"the test hub has no route for {request.method} {request.path}")

    # Who is asking, and what may they see.

    def _user(self, request: Request) -> str:
        if request.token not in self.tokens:
            raise HubError(401, None, "Invalid username or password.")
        return self.tokens[request.token]

    def _readable(self, request: Request, repo: str, contents: bool = True) -> Repository:
        """Return the repository, or answer as the Hub does: 401 also where it does not exist."""
        repository = self.repositories.get(repo)
        owner = self.tokens.get(request.token or "") == repo.partition("/")[0]
        if repository is None or (repository.private and not owner):
            if request.token in self.tokens:
                raise HubError(404, "RepoNotFound", "Repository not found")
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if repository.gated and contents and not owner:
            raise HubError(
                403 if request.token else 401, "GatedRepo", f"Access to {repo} is restricted"
            )
        return repository

    def _writable(self, request: Request, repo: str) -> Repository:
        repository = self._readable(request, repo)
        if self._user(request) != repo.partition("/")[0]:
            raise HubError(403, None, f"You have no right to write to {repo}")
        return repository

    # Routes.

    def _whoami(self, request: Request) -> Answer:
        return Answer.of({"type": "user", "name": self._user(request), "orgs": []})

    def _create(self, request: Request) -> Answer:
        user = self._user(request)
        owner = request.json.get("organization") or user
        if owner != user:
            raise HubError(403, None, f"You have no right to create a repository under {owner}")
        name = f"{owner}/{request.json['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repositories:
            return Answer.of({**url, "error": "You already created this model repo"}, 409)
        self.repositories[name] = Repository(name, request.json.get("visibility") == "private")
        return Answer.of(url)

    def _validate_card(self, request: Request) -> Answer:
        if request.json["content"].startswith("---\n"):
            return Answer.of({"errors": [], "warnings": []})
        return Answer.of(
            {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        )

    def _preupload(self, request: Request, repo: str, revision: str) -> Answer:
        files = self._writable(request, repo).at(revision).files
        answers = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": files[path].etag if path in files else None,
            }
            for path in (asked["path"] for asked in request.json["files"])
        ]
        return Answer.of({"files": answers})

    def _lfs_batch(self, request: Request, repo: str) -> Answer:
        self._writable(request, repo)
        objects = []
        for asked in request.json["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self._large_files:
                upload: dict = {"href": f"{self.endpoint}/lfs/{oid}"}
                if size > PART_SIZE:
                    count = -(-size // PART_SIZE)
                    parts = {
                        f"{n:05d}": f"{self.endpoint}/lfs/{oid}/{n}" for n in range(1, count + 1)
                    }
                    upload["header"] = {"chunk_size": str(PART_SIZE), **parts}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        return Answer.of({"transfer": "basic", "objects": objects})

    def _lfs_put(self, request: Request, oid: str, part: str) -> Answer:
        if part:
            self._parts.setdefault(oid, {})[int(part)] = request.body
            return Answer(headers={"ETag": hashlib.md5(request.body).hexdigest()})
        self._store_large_file(oid, request.body)
        return Answer()

    def _lfs_complete(self, request: Request, oid: str) -> Answer:
        parts = self._parts.pop(oid)
        if [part["partNumber"] for part in request.json["parts"]] != sorted(parts):
            raise HubError(400, None, "parts are missing")
        self._store_large_file(oid, b"".join(parts[number] for number in sorted(parts)))
        return Answer.of({})

    def _store_large_file(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, None, "the content does not have the announced sha256")
        self._large_files[oid] = content

    def _commit(self, request: Request, repo: str, revision: str) -> Answer:
        repository = self._writable(request, repo)
        files = dict(repository.at(revision).files)
        message = ""
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                files[value["path"]] = Blob(self._large_files[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, None, f"the test hub knows no {key!r} in a commit")
        oid = repository.commit(message, files).oid
        return Answer.of({"commitUrl": f"{self.endpoint}/{repo}/commit/{oid}", "commitOid": oid})

    def _info(self, request: Request, repo: str, revision: str) -> Answer:
        repository = self._readable(request, repo, contents=False)
        commit = repository.at(revision or "main")
        return Answer.of(
            {
                "id": repo,
                "sha": commit.oid,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
        )

    def _tree(self, request: Request, repo: str, revision: str, folder: str) -> Answer:
        commit = self._readable(request, repo).at(revision)
        entries = []
        for path, blob in sorted(commit.files.items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
            entries.append(entry)
        if folder and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return Answer.of(entries)

    def _commits(self, request: Request, repo: str, revision: str) -> Answer:
        repository = self._readable(request, repo)
        repository.at(revision)
        return Answer.of(
            [
                {
                    "id": commit.oid,
                    "title": commit.message,
                    "message": "",
                    "authors": [],
                    "date": _DATE,
                }
                for commit in reversed(repository.commits)
            ]
        )

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Answer:
        commit = self._readable(request, repo).at(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", commit.oid)
        blob = commit.files[path]
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return Answer(blob.content, headers=headers)
        headers["X-Linked-ETag"] = f'"{blob.etag}"'
        headers["X-Linked-Size"] = str(len(blob.content))
        headers["Location"] = f"{self._content_host}/lfs/{blob.sha256}"
        return Answer(status=302, headers=headers)

    def _lfs_get(self, request: Request, oid: str) -> Answer:
        if request.token:
            raise HubError(400, None, "the token was sent to the host of the content")
        return Answer(self._large_files[oid], headers={"ETag": f'"{oid}"'})


_DATE = "2026-01-01T00:00:00.000Z"
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", LoopbackHub._whoami),
    ("POST", "/api/repos/create", LoopbackHub._create),
    ("POST", "/api/validate-yaml", LoopbackHub._validate_card),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", LoopbackHub._preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", LoopbackHub._commit),
    ("GET", f"/api/models/{_REPO}(/revision/{_REVISION})?", LoopbackHub._info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", LoopbackHub._tree),
    ("GET", f"/api/models/{_REPO}/commits/{_REVISION}", LoopbackHub._commits),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w{64})(/(?P<part>\d+))?", LoopbackHub._lfs_put),
    ("POST", r"/lfs/(?P<oid>\w{64})", LoopbackHub._lfs_complete),
    ("GET HEAD", r"/lfs/(?P<oid>\w{64})", LoopbackHub._lfs_get),
    ("GET HEAD", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", LoopbackHub._resolve),
)


class _Handler(BaseHTTPRequestHandler):
    """HTTP in, `Request` to the hub, `Answer` out; byte ranges are served here for every answer."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def _handle(self) -> None:
        authorization = self.headers.get("Authorization", "")
        request = Request(
            method=self.command,
            path=urllib.parse.urlsplit(self.path).path,
            token=authorization.removeprefix("Bearer ") or None,
            body=self._read_body(),
        )
        try:
            answer = self._in_range(self.hub.answer(request))
        except HubError as error:
            body = json.dumps({"error": str(error)}).encode()
            answer = Answer(body, error.status, error.headers)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 (the names http.server looks for)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _in_range(self, answer: Answer) -> Answer:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or answer.status != 200:
            return answer
        total = len(answer.body)
        start, end = int(wanted[1]), min(int(wanted[2] or total), total - 1)
        if start >= total:
            return Answer(status=416, headers={"Content-Range": f"bytes */{total}"})
        headers = {**answer.headers, "Content-Range": f"bytes {start}-{end}/{total}"}
        return dataclasses.replace(
            answer, body=answer.body[start : end + 1], status=206, headers=headers
        )

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean; `LoopbackHub.requests` has the log."""
