"""A stand-in for the Hugging Face hub, which cannot be run here: the requests that huggingface_hub makes to publish a folder by LFS.

It was written from that library's source. What it cannot show: Xet transfers, quotas, and whatever the real hub refuses.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 100_000
"""Bytes from which a file goes by LFS here; the hub goes by name and size."""


class Hub:
    """Repositories in memory."""

    def __init__(self) -> None:
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, str]] = []
        """Repository, branch, summary."""
        self.troubles: list[tuple[str, int]] = []
        """Part of a path, and the status with which the next request to it is answered."""
        self.roles = {"hf_right": "write", "hf_reader": "read"}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                path = unquote(urlsplit(self.path).path)
                for trouble in outer.troubles:
                    if trouble[0] in path:
                        outer.troubles.remove(trouble)
                        return self.answer(trouble[1])
                if path.startswith("/lfs/"):
                    outer.objects[path[5:]] = body
                    return self.answer(200)
                role = outer.roles.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
                if role is None:
                    return self.answer(401, headers={"X-Error-Message": "Invalid credentials"})
                if self.command == "POST" and role == "read":
                    return self.answer(403)
                return self.answer(*outer.reply(self.command, path, body, role, self.headers["Host"]))

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *arguments: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()

    def reply(self, method: str, path: str, body: bytes, role: str, host: str) -> tuple[int, Any, dict[str, str]]:
        if path == "/api/whoami-v2":
            return 200, {"name": "ada", "type": "user", "auth": {"accessToken": {"role": role}}}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.private:
                return 409, {"url": f"http://{host}/{name}"}, {}
            self.private[name] = asked.get("visibility") == "private"
            self.branches[name, "main"] = {".gitattributes": b"*.safetensors filter=lfs"}
            return 200, {"url": f"http://{host}/{name}"}, {}
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {"oid": each["oid"], "size": each["size"]}
                | ({} if each["oid"] in self.objects else {"actions": {"upload": {"href": f"http://{host}/lfs/{each['oid']}"}}})
                for each in json.loads(body)["objects"]
            ]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}, {}
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.branches.get((match[1], match[2]), {}).get(match[3])
            if content is None:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
            return (
                200,
                content,
                {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "c0ffee" * 6 + "c0ff"},
            )
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(tree|preupload|commit|branch|revision)/([^/]+)", path)
        if match is None:
            return 404, b"", {}
        name, what, branch = match[1], match[2], match[3]
        if name not in self.private:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        if what == "branch":
            if (name, branch) in self.branches:
                return 409, b"", {}
            self.branches[name, branch] = dict(self.branches[name, "main"])
            return 201, {}, {}
        if (name, branch) not in self.branches:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        files = self.branches[name, branch]
        if what == "revision":
            return 200, {"id": name, "sha": "a" * 40, "siblings": []}, {}
        if what == "tree":
            listed = [
                {"type": "file", "path": each, "size": len(files[each]), "oid": _oid(files[each])} for each in files
            ]
            return 200, listed, {}
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["size"] >= LFS_FROM else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(files[each["path"]]) if each["path"] in files else None,
                }
                for each in asked
            ]
            return 200, {"files": modes}, {}
        return self._commit(name, branch, [json.loads(line) for line in body.splitlines()], host)

    def _commit(
        self, name: str, branch: str, lines: list[dict[str, Any]], host: str
    ) -> tuple[int, Any, dict[str, str]]:
        files = dict(self.branches[name, branch])
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    content = self.objects[value["oid"]]
                    assert hashlib.sha256(content).hexdigest() == value["oid"]
                    files[value["path"]] = content
                case "deletedFile":
                    del files[value["path"]]
        self.branches[name, branch] = files
        self.commits.append((name, branch, lines[0]["value"]["summary"]))
        return 200, {"commitUrl": f"http://{host}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40}, {}


def _oid(content: bytes) -> str:
    """As git names a file, and LFS a large one."""
    if len(content) >= LFS_FROM:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
