"""A repository of the Hugging Face hub as an output's place: one commit holds all of it. Called by stores.

By huggingface_hub, which moves large files as the hub wants them (Xet, else LFS) before the commit names them, and makes no commit when
nothing has changed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from finetune_crds import locations
from finetune_crds.v1alpha1 import Location

from ..errors import UserError
from . import credentials
from .patience import patiently
from .roots import Roots

RECORD = "finetune.json"
_HUBS_OWN = (".gitattributes",)
"""Written by the hub when a repository is made."""

T = TypeVar("T")


class HubStore:
    """A branch of a model repository."""

    digest: str | None = None

    def __init__(self, location: Location, roots: Roots) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        place = locations.parse(location.uri)
        self.uri = location.uri
        self._location = location
        self._repository, self._branch = place.root, place.revision or "main"
        self._scratch = roots.scratch / "hub"
        token = credentials.require(location, "token", roots) if location.secret_ref else None
        self._api = HfApi(endpoint=location.endpoint, token=token)

    def names(self) -> list[str]:
        """See WholeStore."""
        from huggingface_hub import errors

        def ask() -> list[str]:
            try:
                return sorted(self._api.list_repo_files(self._repository, revision=self._branch))
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
                return []

        return [name for name in self._patiently(ask, "read") if name not in _HUBS_OWN]

    def record(self) -> bytes | None:
        """See WholeStore."""
        there = self.names()
        if not there:
            return None
        if RECORD not in there:
            raise UserError(
                f"spec.output: {self.uri} holds files that no FineTuneJob wrote (such as {there[0]}); choose a repository or branch of its own"
            )
        file = self._patiently(
            lambda: self._api.hf_hub_download(
                self._repository, RECORD, revision=self._branch, local_dir=self._scratch, force_download=True
            ),
            "read",
        )
        return Path(file).read_bytes()

    def check_writable(self) -> None:
        """See WholeStore. What a fine-grained token may do only the commit will tell."""
        account = self._patiently(self._api.whoami, "read")
        if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
            self._refuse("may only read")

    def publish(self, folder: Path, record: bytes, summary: str) -> None:
        """See WholeStore. A repository that is not there is made, private."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        new = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

        def commit() -> None:
            self._api.create_repo(self._repository, private=True, exist_ok=True)
            if self._branch != "main":
                self._api.create_branch(self._repository, branch=self._branch, exist_ok=True)
            before = self.record()
            old: set[str] = set(json.loads(before)["files"]) if before else set()
            added = [CommitOperationAdd(name, path) for name, path in sorted(new.items())]
            gone = [CommitOperationDelete(name) for name in sorted(old - new.keys())]
            self._api.create_commit(self._repository, [*added, *gone], commit_message=summary, revision=self._branch)

        self._patiently(commit, "written")

    def _patiently(self, action: Callable[[], T], verb: str) -> T:
        import httpx2
        from huggingface_hub import errors

        def ask() -> T:
            try:
                return action()
            except errors.LocalTokenNotFoundError:
                self._refuse("may not write to it")
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403, 404):
                    self._refuse(f"may not {'read from' if verb == 'read' else 'write to'} it ({status})")
                if status in (408, 409, 412, 425, 429) or status >= 500:
                    raise
                raise UserError(f"{self.uri}: the hub refused the request ({status}); correct the uri") from None

        return patiently(self.uri, ask, (httpx2.TransportError, errors.HfHubHTTPError, RuntimeError), verb=verb)

    def _refuse(self, what: str) -> NoReturn:
        named = self._location.secret_ref
        raise UserError(
            f"{self.uri}: the token in Secret {named.name} {what}; give it write access to this repository"
            if named
            else f"{self.uri}: without a token one {what}; name a Secret with the key token in secretRef"
        )
