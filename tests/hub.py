"""A stub of the Hugging Face Hub on the loopback interface: serves repositories from local folders, takes uploads."""

import base64
import functools
import hashlib
import json
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ACTIONS = "revision|tree|paths-info|commits|refs|discussions|auth-check"
API = re.compile(rf"/api/(?P<kind>models|datasets)/(?P<id>[^/]+(?:/(?!(?:{ACTIONS})(?:/|$))[^/]+)?)"
                 rf"(?:/(?P<action>{ACTIONS})(?:/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?)?/?")
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
PUSH = {  # step of an upload: its path
    "whoami": r"/api/whoami-v2", "create": r"/api/repos/create", "check": r"/api/models/(?P<id>.+)/auth-check/write",
    "yaml": r"/api/validate-yaml", "preupload": r"/api/models/(?P<id>.+)/preupload/main",
    "lfs": r"/(?P<id>.+)\.git/info/lfs/objects/batch", "put": r"/lfs/(?P<id>\w+)",
    "commit": r"/api/models/(?P<id>.+)/commit/main", "info": r"/api/models/(?P<id>[^/]+/[^/]+)(?:/revision/main)?",
}  # fmt: skip
DATE = "2025-01-01T00:00:00.000Z"


@functools.cache
def _blob_id(path, size, mtime):
    return hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()


class HubError(Exception):
    def __init__(self, status, code, message):
        self.status, self.code, self.message = status, code, message


class Repo:
    """What a folder holds at the time of one request; editing the folder makes a new commit."""

    def __init__(self, repo_id, folder):
        self.id, self.files = repo_id, {}
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            stat = path.stat()
            oid = _blob_id(path, stat.st_size, stat.st_mtime_ns)
            self.files[path.relative_to(folder).as_posix()] = (path, stat.st_size, oid)
        listing = [repo_id] + [f"{name} {oid}" for name, (_, _, oid) in self.files.items()]
        self.sha = hashlib.sha1("\n".join(listing).encode()).hexdigest()

    def entries(self):
        commit = {"id": self.sha, "title": "Initial commit", "date": DATE}
        folders = {parent.as_posix() for name in self.files for parent in Path(name).parents} - {"."}
        found = [{"type": "directory", "path": name, "oid": self.sha, "size": 0} for name in folders]
        found += [{"type": "file", "path": n, "oid": oid, "size": size} for n, (_, size, oid) in self.files.items()]
        return [{**entry, "lastCommit": commit} for entry in sorted(found, key=lambda entry: entry["path"])]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def body(self):
        """What was sent, a megabyte at a time."""
        left, parts = int(self.headers.get("Content-Length") or 0), []
        while left > 0 and (part := self.rfile.read(min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
            time.sleep(self.server.hub.pace if left else 0)
        return b"".join(parts)

    def do_GET(self):
        hub = self.server.hub
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        body = self.body()
        hub.requests.append((self.command, self.path))
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else None
        try:
            if token and token not in hub.tokens | hub.unaccepted | hub.narrow:
                raise HubError(401, None, "Invalid credentials in Authorization header")
            step, match = next(((step, found) for step, pattern in PUSH.items()
                                if (found := re.fullmatch(pattern, path))), (None, None))  # fmt: skip
            if step and (step != "info" or match["id"] in hub.pushed):
                self.push(step, match, token, body)
            elif match := RESOLVE.fullmatch(path):
                self.resolve(match, token)
            elif match := API.fullmatch(path):
                self.api(match, token, query, body)
            else:
                raise HubError(404, None, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            if error.status == 401:
                headers["WWW-Authenticate"] = 'Bearer realm="Authentication required", charset="UTF-8"'
            self.reply_json({"error": error.message}, error.status, {**headers, "X-Error-Message": error.message})

    do_HEAD = do_POST = do_PUT = do_GET

    def push(self, step, match, token, body):
        """A step of an upload: as hub.trouble has it, or as the real hub answers it."""
        hub, name = self.server.hub, match.groupdict().get("id")
        trouble = hub.trouble.get(step)
        if trouble == "hangs":
            hub.over.wait()
            self.close_connection = True
            return
        if trouble:
            raise HubError(trouble, None, f"No luck with {step}")
        if not token and step != "put":
            raise HubError(401, None, "Invalid username or password.")
        if step not in ("whoami", "create", "yaml", "put") and name not in hub.pushed:
            raise HubError(404, "RepoNotFound", "Repository not found")
        files = hub.pushed.get(name, {}).get("files")
        answer = {}
        if step == "whoami":
            access = {"accessToken": {"role": hub.roles.get(token, "write")}}
            answer = {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token", **access}}
        elif step == "create":
            wish = json.loads(body)
            name = f"{wish['organization'] or 'tester'}/{wish['name']}"
            answer = {"url": f"{hub.endpoint}/{name}"}
            if name in hub.pushed:
                self.reply_json({**answer, "error": "You already created this model repo"}, 409)
                return
            hub.pushed[name] = {"files": {}, "private": wish.get("visibility") == "private", "commits": []}
        elif step == "preupload":
            answer = {"files": [self.preupload(files, file) for file in json.loads(body)["files"]]}
        elif step == "lfs":
            answer = {"transfer": "basic", "objects": [
                {"oid": wish["oid"], "size": wish["size"]} | ({} if wish["oid"] in hub.stored else {
                    "actions": {"upload": {"href": f"{hub.storage or hub.endpoint}/lfs/{wish['oid']}"}}})
                for wish in json.loads(body)["objects"]]}  # fmt: skip
        elif step == "put":
            assert hashlib.sha256(body).hexdigest() == name
            hub.stored[name] = body
        elif step == "commit":
            entries = [json.loads(line) for line in body.splitlines()]
            new = {entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                   for entry in entries if entry["key"] == "file"}  # fmt: skip
            new |= {entry["value"]["path"]: hub.stored[entry["value"]["oid"]]
                    for entry in entries if entry["key"] == "lfsFile"}  # fmt: skip
            files.update(new)
            hub.pushed[name]["commits"].append(sorted(new))
            answer = {"commitUrl": f"{hub.endpoint}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        elif step == "info":
            answer = {"_id": "0" * 24, "id": name, "sha": "0" * 40, "private": hub.pushed[name]["private"]}
        self.reply_json(answer)

    @staticmethod
    def preupload(files, wish):
        """How a file is to be sent, and the id of what is there under its name."""
        lfs, old = wish["path"].endswith((".safetensors", "tokenizer.json")), files.get(wish["path"])
        git = b"" if lfs or old is None else b"blob %d\0" % len(old)
        oid = old and (hashlib.sha256 if lfs else hashlib.sha1)(git + old).hexdigest()
        return {"path": wish["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def reply(self, data, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reply_json(self, data, status=200, headers=None):
        self.reply(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def repo(self, kind, match, token):
        """The requested repository, or None once a renamed one has been answered with a redirect."""
        hub, repo_id = self.server.hub, match["id"]
        if repo_id in hub.aliases:
            start, end = match.span("id")
            location = self.path[:start] + hub.aliases[repo_id] + self.path[end:]
            self.reply_json({"error": "Moved"}, 307, {"Location": location})
            return None
        if repo_id not in hub.repos[kind]:
            # Without a token the real hub does not tell a missing repository from a private one.
            raise HubError(*((404, "RepoNotFound", "Repository not found") if token else
                             (401, "RepoNotFound", "Invalid username or password.")))
        repo = Repo(repo_id, hub.repos[kind][repo_id])
        if unquote(match["rev"] or "main") not in ("main", repo.sha):
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {unquote(match['rev'])}")
        return repo

    def check_gate(self, kind, repo_id, token):
        hub = self.server.hub
        if repo_id not in hub.gated or token in hub.tokens:
            return
        restricted = f"Access to {kind[:-1]} {repo_id} is restricted"
        if token:
            if token in hub.narrow:
                raise HubError(403, "GatedRepo", "Please enable access to public gated repositories in your "
                                                 "fine-grained token settings to view this repository.")
            page = f"{hub.endpoint}/{'' if kind == 'models' else 'datasets/'}{repo_id}"
            raise HubError(403, "GatedRepo", f"{restricted} and you are not in the authorized list. "
                                             f"Visit {page} to ask for access.")
        raise HubError(401, "GatedRepo", f"{restricted}. You must have access to it and be authenticated "
                                         f"to access it. Please log in.")

    def resolve(self, match, token):
        kind = "datasets" if match["kind"] else "models"
        repo = self.repo(kind, match, token)
        if repo is None:
            return
        self.check_gate(kind, repo.id, token)
        headers = {"X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
        file, size, oid = repo.files.get(unquote(match["path"]), (None, 0, None))
        if file is None:
            self.reply_json({"error": "Entry not found"}, 404,
                            {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        headers |= {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and (start := int(wanted[1])) < size:
            end = min(int(wanted[2] or size), size - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
            self.reply(file.read_bytes()[start:end + 1], 206, headers)
        elif wanted:
            self.reply(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
        else:
            self.reply(file.read_bytes(), 200, headers)

    def api(self, match, token, query, body):
        kind, action = match["kind"], match["action"]
        repo = self.repo(kind, match, token)
        if repo is None:
            return
        # As on the real hub, the metadata and the file list of a gated repository are public.
        path = unquote(match["path"] or "")
        if action in (None, "revision"):
            gated = "manual" if repo.id in self.server.hub.gated else False
            self.reply_json({"_id": repo.sha[:24], "id": repo.id, "sha": repo.sha, "private": False, "gated": gated,
                             "disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": DATE,
                             "createdAt": DATE, "siblings": [{"rfilename": name} for name in repo.files]})
        elif action == "tree":
            below = [e for e in repo.entries() if not path or e["path"].startswith(f"{path}/")]
            if path and not below:
                raise HubError(404, "EntryNotFound", f"{path} does not exist on \"{unquote(match['rev'])}\"")
            if query.get("recursive", ["false"])[0].lower() != "true":
                below = [e for e in below if "/" not in e["path"][len(path):].lstrip("/")]
            self.reply_json(below)
        elif action == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            self.reply_json([entry for entry in repo.entries() if entry["path"] in wanted])
        elif action == "commits":
            self.reply_json([{"id": repo.sha, "title": "Initial commit", "message": "", "date": DATE, "authors": []}])
        elif action == "refs":
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.sha}
            self.reply_json({"branches": [main], "converts": [], "tags": []})
        elif action == "discussions":
            self.reply_json({"discussions": [], "count": 0, "start": 0})
        else:
            self.check_gate(kind, repo.id, token)
            self.reply_json({"status": "ok"})


class StubHub:
    """Serves `models` and `datasets` (repository id -> folder) at `.endpoint` for the length of a `with` block.

    `gated` ids need a token from `tokens`; tokens in `unaccepted` are valid but their owner was not let in, those in
    `narrow` are fine-grained ones without the right to read gated repositories; any other token is invalid. `aliases`
    maps the old id of a renamed repository to its present id. `.requests` is the list of (method, path) seen so far.
    The folders may be edited while the hub runs.

    Uploads are in `.pushed`: id -> {"files": {name: bytes}, "private", "commits": [names]}, large files in `.stored`.
    `.trouble` maps a step of an upload, a key of PUSH, to the status that it is answered with, or to "hangs"; `.roles`
    a token to "read", "write" or "fineGrained"; `.pace` is seconds between the megabytes that are read; `.storage`
    an address for large files.
    """

    def __init__(self, models=None, datasets=None, gated=(), tokens=(), unaccepted=(), narrow=(), aliases=None):
        self.repos = {"models": dict(models or {}), "datasets": dict(datasets or {})}
        self.gated, self.tokens = set(gated), set(tokens)
        self.unaccepted, self.narrow = set(unaccepted), set(narrow)
        self.aliases = dict(aliases or {})
        self.requests, self.over = [], threading.Event()
        self.pushed, self.stored, self.trouble, self.roles, self.pace = {}, {}, {}, {}, 0
        self.storage = ""

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


WORDS = ("the of and in to a was on for as with by he that at from his it were an is which had be river army house "
         "song game year city first two film team war church album season music game played early later")


def _wikitext_rows(count, seed, rare):
    """Rows in wikitext's odd shape: blank lines, headings and paragraphs each take a row of their own."""
    rng, vocabulary = random.Random(seed), WORDS.split()
    rows = []
    while len(rows) < count:
        rows += ["", f" = {rng.choice(vocabulary).title()} {rng.randrange(1000)} = \n", ""]
        for section in range(rng.randint(1, 3)):
            if section:
                rows += ["", f" = = {rng.choice(vocabulary).title()} = = \n", ""]
            for _ in range(rng.randint(1, 4)):
                words = [rare if rng.random() < 0.02 else rng.choice(vocabulary) for _ in range(rng.randint(15, 90))]
                rows.append(f" The {' '.join(words)} , {rng.randint(1800, 2020)} . \n")
    return rows[:count]


def write_wikitext(folder):
    """Writes a small dataset repository laid out like wikitext's and returns its folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    card = ["---", "license: cc-by-sa-3.0", "configs:"]
    for config, train in (("wikitext-103-raw-v1", 600), ("wikitext-2-raw-v1", 300), ("wikitext-2-v1", 300)):
        card += [f"- config_name: {config}", "  data_files:"]
        (folder / config).mkdir(parents=True, exist_ok=True)
        for split, count in (("test", 60), ("train", train), ("validation", 60)):
            rows = _wikitext_rows(count, f"{config} {split}", "Valkyria" if "raw" in config else "<unk>")
            table = pa.table({"text": pa.array(rows, pa.string())})
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# Dataset Card", ""]), encoding="utf-8")
    return folder
