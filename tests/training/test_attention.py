"""Packed documents do not see each other: to the last bit, in logits and in what is learned."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, varlen
from transformers import AutoModelForCausalLM

from finetune_crds import support
from finetune_trainer.modelling import attention
from finetune_trainer.modelling.attention import Documents

from . import tiny

CPU = torch.device("cpu")


def logits(model: Any, *documents: list[int]) -> torch.Tensor:
    """Logits of documents packed behind each other."""
    lengths = [len(document) for document in documents]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([[token for document in documents for token in document]]),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            documents=Documents.of(lengths, CPU),
            use_cache=False,
        ).logits[0]


OVERRIDES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
}
"""Windows shorter than the documents, where a family has them."""


@pytest.fixture(
    scope="module", params=[name for name, family in support.FAMILIES.items() if "text-generation" in family.tasks]
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same model with our attention and with the one it comes with."""
    folder = tiny.make_model(tmp_path_factory.mktemp(request.param), request.param, **OVERRIDES.get(request.param, {}))
    attention.register()
    ours = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.NAME, dtype=torch.float32)
    return ours.eval(), AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def test_a_changed_neighbour_changes_no_bit(models: tuple[Any, Any]) -> None:
    ours, _ = models
    second = list(range(60, 91))
    one = logits(ours, list(range(3, 23)), second)[20:]
    other = logits(ours, list(range(100, 120)), second)[20:]
    assert torch.equal(one, other)
    assert not torch.equal(one, logits(ours, [*range(3, 23), *second])[20:]), (
        "a document that does see the first one differs"
    )


def test_packed_equals_alone_and_equals_eager(models: tuple[Any, Any]) -> None:
    ours, eager = models
    documents = [list(range(3, 23)), list(range(60, 91)), [7]]
    packed = logits(ours, *documents).split([20, 31, 1])
    for document, found in zip(documents, packed, strict=True):
        with torch.no_grad():
            expected = eager(input_ids=torch.tensor([document])).logits[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(found, logits(ours, document), rtol=0, atol=2e-6)


def test_a_cache_changes_nothing(models: tuple[Any, Any]) -> None:
    """Samples are answered with one."""
    ours, _ = models
    tokens = list(range(60, 91))
    with torch.no_grad():
        head = ours(input_ids=torch.tensor([tokens[:20]]), use_cache=True)
        rest = ours(input_ids=torch.tensor([tokens[20:30]]), past_key_values=head.past_key_values, use_cache=True)
        last = ours(input_ids=torch.tensor([tokens[30:]]), past_key_values=rest.past_key_values, use_cache=True)
    found = torch.cat([head.logits, rest.logits, last.logits], dim=1)[0]
    torch.testing.assert_close(found, logits(ours, tokens), rtol=0, atol=2e-6)


def test_the_kernel_is_one_that_can_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would take cuDNN's where a GPU has it, and does not ask whether its backward repeats itself."""
    taken: list[int] = []
    select = varlen._select_backend
    monkeypatch.setattr(varlen, "_cudnn_rejection_reasons", lambda *_: [])
    monkeypatch.setattr(varlen, "_select_backend", lambda *given: taken.append(select(*given)) or taken[-1])
    tokens = torch.empty(8, 4, 64, device="meta", dtype=torch.bfloat16)
    documents = Documents.of([5, 3], torch.device("meta"))
    ends = documents.cumulative
    varlen.varlen_attn(tokens, tokens, tokens, ends, ends, 5, 5)
    assert attention._kernel is not None
    attention._kernel(tokens, tokens, tokens, documents, documents, None, None, True)
    assert taken == [SDPBackend.CUDNN_ATTENTION.value, SDPBackend.FLASH_ATTENTION.value]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("key_heads", "window"), [(2, None), (8, None), (2, 24), (8, 24)])
def test_documents_side_by_side_are_documents_one_by_one(causal: bool, key_heads: int, window: int | None) -> None:
    """What GPUs do with dropout or in fp32: outputs and gradients."""
    lengths = [1, 40, 7, 33, 64, 2, 65]
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(lengths), 16) for heads in (8, key_heads, key_heads)]
    given = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    outer = torch.randn(1, sum(lengths), 8, 16, generator=draw, dtype=torch.float64)
    layer = torch.nn.Module()
    layer.is_causal = causal  # type: ignore[assignment]

    def computed(side_by_side: bool) -> list[torch.Tensor]:
        tensors = [one.clone().requires_grad_() for one in given]
        documents = Documents.of(lengths, CPU)
        if side_by_side:
            out = attention._side_by_side(*tensors, None, 0.0, window, documents, causal)
        elif not causal and key_heads < 8:
            wide = [tensors[0], *(one.repeat_interleave(4, dim=1) for one in tensors[1:])]
            out, _ = attention.documents_attention(layer, *wide, None, sliding_window=window, documents=documents)
        else:
            out, _ = attention.documents_attention(layer, *tensors, None, sliding_window=window, documents=documents)
        out.backward(outer)
        return [out.detach(), *(one.grad for one in tensors if one.grad is not None)]

    for ours, expected in zip(computed(True), computed(False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_side_by_side_pads_by_less_than_half() -> None:
    lengths = (1, 2, 3, 4, 5, 8, 9, 500, 900, 513, 1)
    layout = attention._Layout.of(lengths, CPU)
    assert sum(documents for documents, _ in layout.groups) == len(lengths)
    assert len(layout.at) < 2 * sum(lengths)
    assert layout.at[layout.order].tolist() == list(range(sum(lengths)))
    assert int(layout.inside.sum()) == sum(lengths)
