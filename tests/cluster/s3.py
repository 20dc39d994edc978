"""An S3 server on a folder: versitygw on the host's end of the node's link. Started by the tests that need one."""

from pathlib import Path

from .binaries import find
from .health import answers
from .processes import Process
from .settings import Settings


class ObjectStore:
    """The object store of one cluster. A bucket is a folder in `folder`, an object a file in it."""

    access_key = "finetune"
    secret_key = "finetune-test"
    region = "us-east-1"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.folder = settings.folder / "s3"
        self.endpoint = f"http://{settings.host_address}:{settings.ports['s3']}"
        """For pods of a full cluster and for the host alike."""
        self.process = Process(
            "versitygw",
            settings.folder,
            self._command,
            lambda: answers(f"{self.endpoint}/health"),
            {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key, "VGW_REGION": self.region},
        )

    def start(self) -> None:
        self.process.start()

    def create_bucket(self, name: str) -> Path:
        """Makes a bucket; its folder."""
        bucket = self.folder / name
        bucket.mkdir(parents=True, exist_ok=True)
        return bucket

    def _command(self) -> list[str | Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        address = f"{self._settings.host_address}:{self._settings.ports['s3']}"
        return [find("versitygw"), "--port", address, "--health", "/health", "--quiet", "posix", self.folder]
