"""Progress of training pods into status, over HTTPS: what an unmodified transformers.Trainer script POSTs is understood.

server.py        the listener and the order of checks       certificates.py  CA and leaf in a Secret
reviews.py       token -> pod                               runs.py          may this pod report for this job now
reports.py       body -> numbers, names and places          statuses.py      report + status -> status (pure)
writer.py        coalesced, fenced status writes            limits.py        token buckets
"""

from .certificates import Certificates
from .server import ProgressServer

__all__ = ["Certificates", "ProgressServer"]
