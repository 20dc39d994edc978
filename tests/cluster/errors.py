"""What can go wrong in this package, as one tree: the command line prints these as a sentence, without a traceback.

ClusterError
├─ NotRoot
├─ MissingPackages
├─ ToolchainError
├─ BuildError
├─ ImageBuildError
├─ WrongProfile
├─ NotReady
├─ CommandFailed
├─ KubectlError
└─ Refused
"""


class ClusterError(RuntimeError):
    """Something that the reader can act on; the message says what, where, and what to do."""


class NotRoot(ClusterError):
    """What was asked for needs root, and this process is not; says what for."""


class MissingPackages(ClusterError):
    """Packages are missing and cannot be installed here; says which and how."""


class ToolchainError(ClusterError):
    """No usable Go toolchain; says what to install."""


class BuildError(ClusterError):
    """A program could not be built; the message carries the compiler's last lines."""


class ImageBuildError(ClusterError):
    """An image could not be built or pushed; the message carries the last lines of output."""


class WrongProfile(ClusterError):
    """A cluster of that name exists with another profile."""


class NotReady(ClusterError):
    """A program ended, or did not become ready in time; the message carries the last lines of its log."""


class CommandFailed(ClusterError):
    """A program ended with an error; the message is its command line and what it wrote."""


class KubectlError(ClusterError):
    """kubectl refused; the message is what it wrote."""


class Refused(ClusterError):
    """The API server refused; the message is what it said."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
