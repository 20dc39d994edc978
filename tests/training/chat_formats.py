"""Chat templates of well-known models: the originals that trl carries for comparison, and, written anew and shorter, those of which no package
here has the original, by the models' cards."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple


class ChatFormat(NamedTuple):
    """A template and the special tokens that it needs."""

    template: str
    special: tuple[str, ...]
    end: str
    """eos_token."""
    begin: str | None = None


def _original(name: str) -> str:
    """The text of a template in trl, which need not be imported for it."""
    found = find_spec("trl")
    assert found and found.origin
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nYou are SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A system message of its own, and no tools."""
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(last=0, system='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}"
    "{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' }}{{ {'content': m.content} | tojson }}{{ '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}{{ call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
"""Tools and the system message stand at the last question: a conversation's beginning changes as it grows."""

_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_ROLES = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip
CHAT_FORMATS: dict[str, ChatFormat] = {
    "smollm2": ChatFormat(SMOLLM2, _IM, "<|im_end|>"),
    "qwen2.5": ChatFormat(_original("qwen2_5"), _IM, "<|im_end|>"),
    "qwen3": ChatFormat(_original("qwen3"), _IM, "<|im_end|>"),
    "llama3": ChatFormat(_original("llama3"), _HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3.1": ChatFormat(_original("llama3_1"), _HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3.1-environment": ChatFormat("{% set builtin_tools = [] %}" + _original("llama3_1"), _HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
    "gemma": ChatFormat(_original("gemma"), _TURNS, "<eos>", "<bos>"),
    "gemma3": ChatFormat(_original("gemma3"), _TURNS, "<eos>", "<bos>"),
    "phi3": ChatFormat(_original("phi3"), _ROLES, "<|endoftext|>"),
    "mistral": ChatFormat(MISTRAL, _INST, "</s>", "<s>"),
}  # fmt: skip


def tokenizer(name: str) -> Any:
    """Of bytes, with the format's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chosen = CHAT_FORMATS[name]
    vocabulary = {token: i for i, token in enumerate([*chosen.special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(chosen.special))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=chosen.begin, eos_token=chosen.end, pad_token=chosen.special[0], chat_template=chosen.template
    )  # fmt: skip
