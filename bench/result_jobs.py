"""Jobs of bench/results.py: a manifest through `finetune local`, as a user runs it, and answers of what it published through plain transformers and peft."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.model import SMOLLM2, model_path


def run(
    folder: Path, model: Path, data: Path | list[dict[str, Any]], /, *, keep: bool = True, **spec: Any
) -> dict[str, Any]:
    """A job from its manifest to its output: metrics before and after, and seconds; also in result.json.

    The same manifest with the same data is not trained again; one that was interrupted goes on from its last checkpoint. What training needed is deleted at its end, and without `keep` the weights too.
    """
    train = [{"uri": data.as_uri()}] if isinstance(data, Path) else data
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "results"},
        "spec": {
            "model": {"uri": model.as_uri()},
            "output": {"uri": (folder / "output").as_uri()},
            "resources": {"gpusPerNode": 0, "cpu": 2},
            **spec,
            "dataset": {"train": train, **spec.get("dataset", {})},
        },
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)  # which is YAML too
    place, result = folder / "job.yaml", folder / "result.json"
    digest = _digest(text)
    if result.exists() and (found := json.loads(result.read_text()))["digest"] == digest:
        return dict(found)
    folder.mkdir(parents=True, exist_ok=True)
    place.write_text(text)
    print(f"  {folder.name}: training; {folder / 'log'}", file=sys.stderr)
    began = time.monotonic(), _children_cpu()
    with (folder / "log").open("a") as log:
        code = subprocess.run(
            [sys.executable, "-m", "finetune_trainer.cli", "local", "-f", str(place), "--scratch", str(folder / "scratch")],
            stdout=log, stderr=subprocess.STDOUT, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).returncode  # fmt: skip
    if code:
        sys.exit(f"the job of {place} ended with {code}; its log is {folder / 'log'}")
    record = json.loads((folder / "output/finetune.json").read_text())
    found = {key: record[key] for key in ("before", "after", "rows", "tokens", "total_steps", "evaluation_rows")}
    found |= {"seconds": time.monotonic() - began[0], "cpu_seconds": _children_cpu() - began[1], "digest": digest}
    result.write_text(json.dumps(found, indent=1))
    for spent in [folder / "scratch", folder / "output.checkpoints", *([] if keep else [folder / "output"])]:
        shutil.rmtree(spent, ignore_errors=True)
    return found


def _children_cpu() -> float:
    """Seconds that processes started here have worked: unlike time, not a matter of what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _digest(manifest: str) -> str:
    """Of a manifest and of what its data hold; the model is what its name says."""
    known = hashlib.sha256(manifest.encode())
    for place in sorted({Path(uri) for uri in re.findall(r"file://(\S+)", manifest)}):
        for file in [place] if place.is_file() else sorted(place.rglob("*")) if "data" in place.parts else []:
            known.update(file.read_bytes() if file.is_file() else b"")
    return known.hexdigest()


def rows(place: Path, listed: Iterable[dict[str, Any]]) -> Path:
    """A JSON lines file of them."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed))
    return place


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct."""
    return model_path(SMOLLM2)


def answers(
    adapter: Path | None, chats: Sequence[list[dict[str, str]]], longest: int, shown: str, batch: int = 25
) -> list[str]:
    """What SmolLM2, or what a job made of it, writes greedily behind each conversation, in at most `longest` tokens."""
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = smollm2()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter)
    model.eval()
    found: list[str] = []
    with torch.inference_mode():
        for first in range(0, len(chats), batch):
            print(f"  {shown}: {first} of {len(chats)} answers", file=sys.stderr)
            texts = [
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                for chat in chats[first : first + batch]
            ]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            written = model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            found += tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [one.strip() for one in found]
