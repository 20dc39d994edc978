"""Tiny random models of each supported family with a tokenizer of bytes, rows to train on, and jobs around them."""

import functools
import json
import random
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from finetune_crds.progress import RunReport
from finetune_crds.resolution import Defaults, Published, resolve
from finetune_crds.resolved import ResolvedJob
from finetune_crds.v1alpha1 import FineTuneJob, Location
from finetune_trainer.context import RunContext
from finetune_trainer.ranks import Ranks
from finetune_trainer.storage.stores import VolumeFolder, open_output, open_store

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["red", "green", "blue", "one", "two", "three", "stone", "river", "cloud", "lamp", "door", "horse", "iron"]


def tokenizer(template: str | None = CHATML) -> Any:
    """A tokenizer of bytes."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        model_max_length=2048,
    )


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "seq_classif_dropout": 0.0},
    "modernbert": {
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8,
        "global_attn_every_n_layers": 2, "classifier_pooling": "mean", "initializer_cutoff_factor": 2.0, "embedding_dropout": 0.0,
    },
    "roberta": {"pad_token_id": 0},
    "xlm-roberta": {"pad_token_id": 0},
}  # fmt: skip
"""Families of encoders, with what their configurations call differently."""


def kept(make: Callable[..., Path]) -> Callable[..., Path]:
    """Makes a model once a process, and writes the same files again where another test wants them."""
    made: dict[str, dict[str, bytes]] = {}

    @functools.wraps(make)
    def again(folder: Path, *arguments: Any, **options: Any) -> Path:
        key = json.dumps([arguments, options], sort_keys=True)
        if key not in made:
            with tempfile.TemporaryDirectory() as place:
                make(Path(place), *arguments, **options)
                made[key] = {path.name: path.read_bytes() for path in Path(place).iterdir()}
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in made[key].items():
            (folder / name).write_bytes(content)
        return folder

    return again


@kept
def make_encoder(folder: Path, family: str = "bert", dropout: float = 0.0) -> Path:
    """A headless encoder with random weights of seed 20; its tokenizer puts a token before and one behind each row.

    The weights are large enough for the first token to tell rows apart before anything is learned.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(20)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    rates = dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"), dropout
    )
    config = AutoConfig.for_model(
        family, vocab_size=259, max_position_embeddings=258, initializer_range=0.2, **shape | rates | ENCODERS[family]
    )
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
    bytes_ = tokenizer(template=None)
    bytes_.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    bytes_.eos_token, bytes_.cls_token, bytes_.sep_token = None, "<|im_start|>", "<|im_end|>"
    bytes_.save_pretrained(folder)
    return folder


_T5 = {"d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "initializer_factor": 0.3}
_GATED = _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_BART = {f"{part}_layers": 2 for part in ("encoder", "decoder")} | {
    f"{part}_{name}": number
    for part in ("encoder", "decoder")
    for name, number in (("attention_heads", 4), ("ffn_dim", 128))
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _BART | {"decoder_start_token_id": 2, "max_position_embeddings": 256, "init_std": 0.1},
    "mt5": _GATED,
    "t5": _T5,
    "t5-gated": _GATED,
}
"""Families that make one text of another, with their shapes; of t5 also the one whose head is not its embedding (T5 1.1, Flan-T5)."""


@kept
def make_encoder_decoder(folder: Path, family: str, dropout: float = 0.0) -> Path:
    """One with random weights of seed 20; BART's logits have a bias, which its head has not. Its tokenizer ends each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(20)
    shape = {"vocab_size": 259, "d_model": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rates = dict.fromkeys(("dropout", "dropout_rate", "attention_dropout", "activation_dropout"), dropout)
    config = AutoConfig.for_model(
        family.removesuffix("-gated"), **shape | {"decoder_start_token_id": 0} | rates | ENCODER_DECODERS[family]
    )
    model: Any = AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    if ENCODER_DECODERS[family].get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(259, 64))
    if family == "bart":
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    bytes_ = tokenizer(template=None)
    bytes_.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>" if family == "bart" else "$A <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    bytes_.save_pretrained(folder)
    return folder


SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 128, "num_key_value_heads": None, "head_dim": None, "intermediate_size": None, "initializer_range": 0.1},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 32, "initializer_range": 0.1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "initializer_range": 0.1},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "initializer_range": 0.1,
    },
}  # fmt: skip
"""Shapes that differ; None: the family knows no such thing. Of experts four small ones, of which two compute a token."""


@kept
def make_model(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A model with random weights of seed 20; of an encoder's family, a headless one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family in ENCODERS:
        return make_encoder(folder, family, **overrides)
    if family in ENCODER_DECODERS:
        return make_encoder_decoder(folder, family, **overrides)
    overrides = SHAPES.get(family, {}) | overrides

    shape: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(20)
    config = AutoConfig.for_model(
        family, **{name: value for name, value in (shape | overrides).items() if value is not None}
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def chat_rows(count: int, seed: int = 7) -> list[dict[str, Any]]:
    """Ragged conversations of one to three turns with something to learn: the answer is the question's last word, twice."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            question = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": " ".join([question.split()[-1]] * 2)})
        rows.append({"messages": messages})
    return rows


TAGS = {"red": "B-COLOUR", "green": "B-COLOUR", "blue": "I-COLOUR", "one": "B-NUMBER", "two": "I-NUMBER"}


def tagged_rows(count: int) -> list[dict[str, Any]]:
    """Words, some of them colours and numbers."""
    rng = random.Random(3)
    rows = [rng.choices(WORDS, k=rng.randint(1, 9)) for _ in range(count)]
    return [{"tokens": words, "ner_tags": [TAGS.get(word, "O") for word in words]} for words in rows]


def question_rows(count: int) -> list[dict[str, Any]]:
    """Where is a word? A third of the contexts do not say."""
    rng = random.Random(4)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        words = rng.sample(WORDS, k=rng.randint(5, 12))
        context, word = " ".join(words), words[0]
        if i % 3 == 0:
            word, answers = "absent", {"text": [], "answer_start": []}
        else:
            answers = {"text": [f"{words[0]} {words[1]}"], "answer_start": [0]}
        rows.append({"question": f"where is {word}", "context": context, "answers": answers})
    return rows


def pair_rows(count: int, seed: int = 7) -> list[dict[str, str]]:
    """Ragged texts, and of each its last word, twice."""
    rng = random.Random(seed)
    texts = [rng.choices(WORDS, k=rng.randint(1, 6)) for _ in range(count)]
    return [{"source": " ".join(words), "target": " ".join([words[-1]] * 2)} for words in texts]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines; a file that holds them already stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != content:
        path.write_text(content)
    return path


def job(
    folder: Path,
    model: Path,
    data: Path | list[dict[str, Any]],
    /,
    published: dict[str, Published] | None = None,
    **spec: Any,
) -> ResolvedJob:
    """A resolved job that reads and writes below `folder` and holds nothing out; `spec` is merged over the smallest one."""
    train = data if isinstance(data, list) else [{"uri": f"file://{data}"}]
    given = {"evaluation": {"fraction": "0"}} | spec.pop("dataset", {})
    dataset = {"train": train} | {name: value for name, value in given.items() if value is not None}
    base = spec.pop("model", {})
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny", "namespace": "default", "uid": "11111111-2222-3333-4444-555555555555"},
        "spec": {
            "model": {"uri": f"file://{model}"} | base,
            "dataset": dataset,
            "output": {"uri": f"file://{folder}/output"},
            "resources": {"gpusPerNode": 0},
            **spec,
        },
    }
    return resolve(FineTuneJob.model_validate(manifest), Defaults(trainer_image="tiny"), published)


@dataclass
class Recorder:
    """A reporter that remembers."""

    stop_requested: str | None = None
    fenced: bool = False
    stop_at: int | None = None
    file: Path | None = None
    reports: list[tuple[RunReport, dict[str, float]]] = field(default_factory=list)

    def update(self, report: RunReport, metrics: dict[str, float]) -> None:
        """Remembers; with a file, each step as a line in it, for a process that will be killed."""
        self.reports.append((report, metrics))
        if self.file is not None:
            with self.file.open("a") as out:
                out.write(json.dumps({"stage": report.stage, "step": report.step, "first": report.first_step}) + "\n")
        if self.stop_at is not None and report.step >= self.stop_at:
            self.stop_requested = "Suspended"

    def close(self, timeout: float = 10.0) -> None:
        """Nothing."""


def context(
    resolved: ResolvedJob,
    scratch: Path,
    *,
    attempt: int = 1,
    run_id: str = "run",
    ranks: Ranks | None = None,
    reporter: Recorder | None = None,
) -> RunContext:
    """What a run of this job has."""
    spec = resolved.spec
    assert spec.checkpoints.storage and spec.output
    return RunContext(
        ranks=ranks or Ranks(),
        scratch=scratch,
        attempt=attempt,
        run_id=run_id,
        reporter=reporter or Recorder(),
        stop=threading.Event(),
        checkpoints=open_store(Location(**spec.checkpoints.storage.model_dump())),
        output=open_output(Location(**spec.output.model_dump(include={"uri", "secret_ref", "endpoint"}))),
    )


class Elsewhere(VolumeFolder):
    """A store that is no folder of this machine as far as the trainer can tell: it goes the way of S3."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"s3://bucket/{folder.name}", folder)
        self.local = None


def losses(folder: Path, name: str = "loss_hex") -> list[str]:
    """Hex losses of each step from a metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]
