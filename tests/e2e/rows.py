"""Small data for the tiny model: enough to step on, nothing to understand."""

import json


def chat(count: int = 24) -> str:
    """Chat rows as JSON lines."""
    return "\n".join(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"What is {i} plus {i + 1}?"},
                    {"role": "assistant", "content": f"It is {2 * i + 1}."},
                ]
            }
        )
        for i in range(count)
    )


def labelled(count: int = 24) -> str:
    """Classification rows as JSON lines: whether a number is even."""
    return "\n".join(
        json.dumps({"text": f"number {i} " * (1 + i % 3), "label": ["even", "odd"][i % 2]}) for i in range(count)
    )


def preferences(count: int = 24) -> str:
    """Pairs as JSON lines: the short answer is liked."""
    return "\n".join(
        json.dumps(
            {
                "prompt": f"What is {i} plus {i + 1}?",
                "chosen": f"{2 * i + 1}.",
                "rejected": f"I have no idea, and I shall say so at length: not {2 * i}.",
            }
        )
        for i in range(count)
    )


def questions(count: int = 8) -> str:
    """Prompts alone, as JSON lines."""
    return "\n".join(json.dumps({"prompt": f"What is {i} plus {i + 1}?"}) for i in range(count))
