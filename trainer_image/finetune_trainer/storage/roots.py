"""Where claims, ConfigMaps, Secrets and scratch lie: the pod's fixed paths, or below one folder for `finetune local`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from finetune_crds import names

ENV_ROOT: Final = "FINETUNE_ROOT"
"""Set by `finetune local` to a folder that is laid out like names.ROOT; unset in a pod."""


@dataclass(frozen=True)
class Roots:
    """Root folders of what a job's URIs point to."""

    volumes: Path = Path(names.VOLUMES_DIR)
    configmaps: Path = Path(names.CONFIGMAPS_DIR)
    secrets: Path = Path(names.SECRETS_DIR)
    scratch: Path = Path(names.SCRATCH_DIR)

    @classmethod
    def below(cls, root: Path) -> "Roots":
        """The pod's layout below another folder."""
        return cls(
            *(
                root / Path(path).relative_to(names.ROOT)
                for path in (
                    names.VOLUMES_DIR,
                    names.CONFIGMAPS_DIR,
                    names.SECRETS_DIR,
                    names.SCRATCH_DIR,
                )
            )
        )

    @classmethod
    def from_environment(cls) -> "Roots":
        """What this process was started with."""
        root = os.environ.get(ENV_ROOT)
        return cls.below(Path(root)) if root else cls()
