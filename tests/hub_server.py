"""A small local Hub: what huggingface_hub's HTTP client needs to create a repository, upload and download.

Written after the client's own requests; every file travels in the commit itself ("regular"), none by LFS or Xet.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalHub(ThreadingHTTPServer):
    """Serves on a free local port.

    Args:
        users: token -> user, who may write to repositories under their own name alone.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users, self.repositories, self.requests = users, {}, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass

    def answer(self):
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {path}")
        user = self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if path == "/api/whoami-v2":
            if user is None:
                return self.send(401, {"error": "Invalid token"})
            return self.send(200, {"name": user, "type": "user"})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            fields = json.loads(body)
            name = f"{fields.get('organization') or user}/{fields['name']}"
            if name.split("/")[0] != user:
                return self.send(403, {"error": "You don't have the rights to create a model under this namespace"})
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, {})
            return self.send(409 if known else 200, {"url": f"{self.server.endpoint}/{name}", "name": name})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path):
            return self.answer_api(*found.groups(), user, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send_file(*found.groups())
        return self.send(404, {"error": path})

    def answer_api(self, name: str, rest: str | None, user: str | None, body: bytes):
        rest, files = rest or "", self.server.repositories.get(name)
        if files is None:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        writes = rest.startswith(("/preupload", "/commit")) or rest == "/auth-check/write"
        if writes and name.split("/")[0] != user:
            return self.send(403, {"error": "Forbidden: you may not write here"})
        if rest.startswith("/auth-check"):
            return self.send(200, {})
        if rest.startswith("/preupload"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in names]
            return self.send(200, {"files": modes})
        if rest.startswith("/commit/"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    files.pop(line["value"]["path"])
            url = f"{self.server.endpoint}/{name}/commit/{digest(files)}"
            return self.send(200, {"success": True, "commitOid": digest(files), "commitUrl": url})
        if rest.startswith("/tree/"):
            entries = [{"type": "file", "path": p, "size": len(b), "oid": digest({p: b})} for p, b in files.items()]
            return self.send(200, entries)
        if rest == "" or rest.startswith("/revision/"):
            siblings = [{"rfilename": path} for path in files]
            return self.send(200, {"id": name, "sha": digest(files), "siblings": siblings, "tags": []})
        return self.send(404, {"error": rest})

    def send_file(self, name: str, path: str):
        files = self.server.repositories.get(name)
        if files is None:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": digest(files)}
        if path not in files:
            return self.send(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        return self.send(200, files[path], headers | {"ETag": f'"{digest({path: files[path]})}"'})

    def send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def digest(files: dict[str, bytes]) -> str:
    parts = (hashlib.sha1(name.encode() + files[name]).digest() for name in sorted(files))
    return hashlib.sha1(b"".join(parts)).hexdigest()
