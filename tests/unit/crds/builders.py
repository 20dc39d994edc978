"""Manifests for tests, built up word by word."""

from typing import Any


def manifest(**spec: Any) -> dict[str, Any]:
    """The smallest useful FineTuneJob, with fields of spec replaced or, by None, removed."""
    smallest: dict[str, Any] = {
        "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
        "dataset": {"train": [{"uri": "pvc://datasets/support/train.jsonl"}]},
        "output": {"uri": "pvc://models/support-bot"},
    }
    fields = {key: value for key, value in {**smallest, **spec}.items() if value is not None}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support-bot"},
        "spec": fields,
    }
