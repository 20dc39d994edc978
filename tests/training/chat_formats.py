"""Chat templates in the formats of well-known models, written anew and shorter: the same markers, the same treatment of system messages,
tools and thoughts. Facts of the formats are those of each model's card."""

from typing import Any, NamedTuple


class ChatFormat(NamedTuple):
    """A template and the special tokens that it needs."""

    template: str
    special: tuple[str, ...]
    end: str
    """eos_token."""
    begin: str | None = None


_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_CALLS = (
    '{% for call in m.tool_calls %}{{ \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
)
_TOOLS = "{% if tools %}{{ '\\n\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
_RESULT = "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"

SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\\nYou are SmolLM<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}" + _ASK
)
QWEN25 = (
    "{% set system = messages[0].content if messages[0].role == 'system' else 'You are Qwen.' %}"
    "{{ '<|im_start|>system\\n' + system }}" + _TOOLS + "{{ '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role == 'tool' %}" + _RESULT + "{% elif m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\\n' + m.content }}{% endif %}" + _CALLS + "{{ '<|im_end|>\\n' }}"
    "{% elif m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _ASK
)  # fmt: skip
"""A system message of its own where there is none; results of tools are the user's."""
QWEN3 = (
    "{% if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + _TOOLS + "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}" + _RESULT + "{% elif m.role == 'assistant' %}"
    "{% set text = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ text }}"
    "{% if m.tool_calls %}" + _CALLS + "{% endif %}{{ '<|im_end|>\\n' }}"
    "{% elif m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _ASK
)  # fmt: skip
"""Thoughts of answers before the last question are dropped, and the last answer always has some, if empty."""
LLAMA3 = (
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' + system + '<|eot_id|>' }}"
    "{% set ns = namespace(tools=tools) %}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% elif m.role != 'system' %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{% if m.role == 'user' and ns.tools %}{% for tool in ns.tools %}{{ tool | tojson + '\\n\\n' }}{% endfor %}{% set ns.tools = none %}{% endif %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}' + END }}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Tools stand in the first question; END is what ends a call."""
_GEMMA = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}SYSTEM{% else %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + ns.system + m.content | trim + '<end_of_turn>\\n' }}{% set ns.system = '' %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
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
_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip
CHAT_FORMATS: dict[str, ChatFormat] = {
    "smollm2": ChatFormat(SMOLLM2, _IM, "<|im_end|>"),
    "qwen2.5": ChatFormat(QWEN25, _IM, "<|im_end|>"),
    "qwen3": ChatFormat(QWEN3, _IM, "<|im_end|>"),
    "llama3": ChatFormat(LLAMA3.replace("END", "'<|eot_id|>'"), _HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3-environment": ChatFormat(LLAMA3.replace("END", "'<|eom_id|>'"), _HEADERS, "<|eot_id|>", "<|begin_of_text|>"),
    "gemma": ChatFormat(_GEMMA.replace("SYSTEM", "{{ raise_exception('System role not supported') }}"), _TURNS, "<eos>", "<bos>"),
    "gemma3": ChatFormat(_GEMMA.replace("SYSTEM", "{% set ns.system = m.content + '\\n\\n' %}"), _TURNS, "<eos>", "<bos>"),
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
