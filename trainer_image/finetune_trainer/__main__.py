"""`python -m finetune_trainer`: the same as `finetune`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
