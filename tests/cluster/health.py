"""Asks health endpoints whether a program serves; the ready checks of all processes."""

import json
import ssl
import urllib.request

# Parts that serve with a certificate of their own making are asked on loopback only.
_UNVERIFIED = ssl.create_default_context()
_UNVERIFIED.check_hostname = False
_UNVERIFIED.verify_mode = ssl.CERT_NONE


def answers(url: str, context: ssl.SSLContext | None = None) -> bool:
    """Whether a health endpoint says that all is well; OSError (as urllib's errors are) when nothing answers or it answers no."""
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context or _UNVERIFIED))
    with urllib.request.build_opener(*handlers).open(url, timeout=2) as response:
        body = response.read()
    # etcd answers 200 with {"health": "false"} while it has no leader.
    return not body.startswith(b"{") or json.loads(body).get("health", "true") == "true"
