"""Answers of a model, or of what a job published, by plain libraries: a process that bench/results.py starts.

    python bench/result_answers.py REQUEST.json ANSWERS.json

An output is opened by the lines of Python in its own README.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

BATCH = 256


def opened(output: str | None, folder: str) -> Any:
    """The model, as its README.md says where a job made it."""
    if output is None:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    code = (Path(output) / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"transformers": transformers, "peft": peft}
    exec(code.replace("this folder", output), names)
    return names["model"]


def main() -> None:
    """Reads the request, and writes an answer for each conversation."""
    request = json.loads(Path(sys.argv[1]).read_text())
    transformers.utils.logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(request["model"], padding_side="left")
    model = opened(request["output"], request["model"]).eval()
    if torch.cuda.is_available():
        model = model.cuda()
    found: dict[str, list[str]] = {}
    with torch.inference_mode():
        for name, chats in request["asked"].items():
            found[name] = []
            for first in range(0, len(chats), BATCH):
                texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats[first : first + BATCH]]  # fmt: skip
                inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
                written = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=request["longest"], do_sample=False, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
                said = written[:, inputs.input_ids.shape[1] :]
                found[name] += [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
