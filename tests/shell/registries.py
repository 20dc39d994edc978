"""Real registries for tests: Debian's docker-registry, open, behind a password, or behind tokens; and a line to one that breaks."""

import base64
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509 import load_pem_x509_certificate

from cluster.health import answers
from cluster.packages import NODE, find_program, install_missing
from cluster.pki import Authority
from cluster.ports import free_port
from cluster.processes import Process

USER, PASSWORD = "ada", "difference"
_HTPASSWD = "ada:$2b$05$XzcULI4DTLPCFsJzFg9PsOHc4uqxhN0gdWHEspKLvVC.Hvc3BSk1S\n"
"""bcrypt of PASSWORD, which is the only kind that the registry takes."""


class RealRegistry:
    """A registry, on loopback unless told otherwise."""

    def __init__(self, folder: Path, auth: dict[str, object] | None = None, address: str = "127.0.0.1") -> None:
        install_missing({"docker-registry": NODE["docker-registry"]})
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.host = f"{address}:{self.port}"
        config = {
            "version": 0.1,
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
            "http": {"addr": self.host, "secret": "of the tests"},
            **({"auth": auth} if auth else {}),
        }
        (folder / "registry.yaml").write_text(yaml.safe_dump(config))
        self.process = Process("registry", folder, self._command, lambda: answers(f"http://{self.host}/"))
        self.process.start()

    def blobs(self) -> set[str]:
        """Digests of what it holds, manifests included."""
        found = (self.folder / "storage/docker/registry/v2/blobs/sha256").glob("*/*/data")
        return {f"sha256:{path.parent.name}" for path in found}

    def log(self) -> str:
        return self.process.log.read_text()

    def _command(self) -> list[str | Path]:
        return [find_program("docker-registry"), "serve", self.folder / "registry.yaml"]


def with_password(folder: Path, address: str = "127.0.0.1") -> RealRegistry:
    folder.mkdir(parents=True)
    (folder / "htpasswd").write_text(_HTPASSWD)
    return RealRegistry(folder, {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}, address)


@dataclass
class TokenServer:
    """Hands out tokens of the Docker kind, signed with a certificate that the registry trusts."""

    authority: Authority
    asked: list[tuple[str, bool]] = field(default_factory=list)
    """Scope, and whether a password came along."""
    seconds: int = 300
    """How long a token holds."""

    def __post_init__(self) -> None:
        files = self.authority.issue("tokens", names=["127.0.0.1"])
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        chain = load_pem_x509_certificate(files.certificate.read_bytes())
        x5c = base64.b64encode(chain.public_bytes(serialization.Encoding.DER)).decode()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                scope, service = query["scope"][0], query["service"][0]
                given = self.headers.get("Authorization")
                outer.asked.append((scope, given is not None))
                right = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                if given not in (None, right):
                    self.send_error(401)
                    return
                kind, name, actions = scope.split(":")
                allowed = actions.split(",") if given else ["pull"]
                now = int(time.time())
                claims = {
                    "iss": "tests", "sub": USER, "aud": service, "iat": now, "nbf": now - 5, "exp": now + outer.seconds,
                    "access": [{"type": kind, "name": name, "actions": allowed}],
                }  # fmt: skip
                body = json.dumps({"token": _signed(claims, x5c, key)}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def registry(self, folder: Path) -> RealRegistry:
        """A registry that trusts it."""
        realm = f"http://127.0.0.1:{self.httpd.server_port}/token"
        bundle = str(self.authority.files.certificate)
        token = {"realm": realm, "service": "registry", "issuer": "tests", "rootcertbundle": bundle}
        return RealRegistry(folder, {"token": token})

    def stop(self) -> None:
        self.httpd.shutdown()
        self.httpd.server_close()


def _signed(claims: dict[str, object], x5c: str, key: ec.EllipticCurvePrivateKey) -> str:
    header = {"typ": "JWT", "alg": "ES256", "x5c": [x5c]}
    text = ".".join(_packed(json.dumps(part).encode()) for part in (header, claims))
    r, s = decode_dss_signature(key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{_packed(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _packed(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


class BreakingLine:
    """A TCP line to a server. `cut_after` holds how many bytes of requests it lets through until it breaks, and then until it does again."""

    def __init__(self, port: int) -> None:
        self.cut_after: list[int] = []
        self.cuts = 0
        self._lock = threading.Lock()
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            end = self._ender(near, far)
            threading.Thread(target=self._pump, args=(near, far, True, end), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False, end), daemon=True).start()

    def _ender(self, *ends: socket.socket) -> Callable[[], None]:
        def end() -> None:
            for each in ends:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

        return end

    def _pump(self, source: socket.socket, target: socket.socket, breaks: bool, end: Callable[[], None]) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                through = self._through(len(data)) if breaks else len(data)
                target.sendall(data[:through])
                if through < len(data):
                    break
        end()

    def _through(self, count: int) -> int:
        """How many of so many bytes get through."""
        with self._lock:
            if not self.cut_after:
                return count
            left = self.cut_after[0]
            if count < left:
                self.cut_after[0] -= count
                return count
            self.cut_after.pop(0)
            self.cuts += 1
            return left - 1
