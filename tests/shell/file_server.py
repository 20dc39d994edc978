"""A real server of files on loopback that breaks off, refuses and changes its mind, with as much of the hub's protocol as its own client asks for."""

import hashlib
import json
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Files:
    """A server of named files with ETags and ranges. `troubles` answers come first."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.json: dict[str, Any] = {}
        self.troubles: list[int | str] = []
        self.needs_token = ""
        self.knows_head = True
        self.gives_parts = True
        self.most = 0
        """Bytes that it gives at a time, whatever was asked for; 0: as many as were."""
        self.parts_have_versions = True
        self.connections = 0
        self.moved: dict[str, str] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path, Range."""
        self.authorizations: list[str | None] = []
        """That each request came with."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer.connections += 1

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                outer.requests.append((self.command, self.path, self.headers["Range"]))
                given = self.headers["Authorization"]
                outer.authorizations.append(given)
                if outer.needs_token and given != f"Bearer {outer.needs_token}":
                    return self.answer(401 if given is None else 403, b"")
                if self.command == "HEAD" and not outer.knows_head:
                    return self.answer(403, b"")
                trouble = outer.troubles.pop(0) if outer.troubles and self.command == "GET" else None
                if isinstance(trouble, int):
                    return self.answer(trouble, b"")
                if path in outer.moved:
                    return self.answer(302, b"", {"Location": outer.moved[path]})
                if path in outer.json:
                    return self.answer(200, json.dumps(outer.json[path]).encode(), {"Content-Type": "application/json"})
                if path not in outer.files:
                    known = any(key.startswith(path.partition("/revision/")[0] + "/") for key in outer.json)
                    code = "RevisionNotFound" if known else "RepoNotFound"
                    return self.answer(404, b"{}", {"X-Error-Code": code} if "/api/" in path else {})
                body = outer.files[path]
                tag = f'"{hashlib.sha256(body).hexdigest()}"'
                headers = {"ETag": tag, "X-Repo-Commit": "c0ffee" * 6 + "c0ff"}
                headers |= {"Accept-Ranges": "bytes"} if outer.gives_parts else {}
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
                status = 200
                if outer.gives_parts and asked and self.headers.get("If-Range", tag) == tag:
                    start, end = int(asked[1]), min(int(asked[2] or len(body) - 1) + 1, len(body))
                    if start >= len(body):
                        return self.answer(416, b"")
                    end = min(end, start + outer.most) if outer.most else end
                    if not outer.parts_have_versions:
                        del headers["ETag"]
                    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
                    body, status = body[start:end], 206
                return self.answer(status, body, headers, torn=trouble == "torn")

            def answer(
                self, status: int, body: bytes, headers: dict[str, str] | None = None, torn: bool = False
            ) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body[: len(body) // 2] if torn else body)
                self.close_connection = torn

            def log_message(self, *arguments: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = True
        if context:
            self.httpd.socket = context.wrap_socket(self.httpd.socket, server_side=True)
        self.address = f"{'https' if context else 'http'}://127.0.0.1:{self.httpd.server_port}"
        self.thread = threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()
        self.thread.join()
