"""The operator: a Kopf shell around a keyed queue and a level-triggered reconcile of FineTuneJobs.

watch (handlers) -> queue -> reconcile = observe -> decide (pure) -> act -> one status write
"""

from importlib.metadata import version

__version__ = version("finetune-operator")
