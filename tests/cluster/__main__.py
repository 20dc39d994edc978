"""`python -m cluster`: the same clusters from a shell."""

import sys

from .cli import main

sys.exit(main())
