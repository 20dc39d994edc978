"""Loading a model and putting adapters on it. Called by train.

What the rest of the trainer needs of a model is small: hidden states of a flat batch, the head, and which weights are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune_crds import support
from finetune_crds.resolution import ResolvedFineTune, ResolvedLora

from ..data.batches import Batch
from ..errors import UserError
from . import attention

ALL_LINEAR = "all-linear"
_PLAIN = {"final_logit_softcapping": None, "attn_logit_softcapping": None, "logits_scaling": 1, "logit_scale": 1}
"""What our head and attention do not do, with the value that stands for not doing it."""


@dataclass(frozen=True)
class Model:
    """A model that can be trained."""

    outer: Any
    """What is saved: a PeftModel, or the transformers model itself."""
    inner: Any
    """The transformers model, adapters inside."""
    dtype: torch.dtype
    """What the model was stored in, and is published in if all of it is trained."""

    @property
    def is_adapter(self) -> bool:
        """Whether a LoRA adapter is trained, not the model."""
        return self.outer is not self.inner

    @property
    def head(self) -> nn.Module:
        """The layer that makes logits of hidden states."""
        head: nn.Module = self.inner.score if hasattr(self.inner, "score") else self.inner.get_output_embeddings()
        return head

    def hidden(self, batch: Batch) -> Tensor:
        """(targets, size): hidden states where something is predicted. Logits of all other tokens are never computed."""
        states = self.inner.base_model(
            input_ids=batch.tokens, position_ids=batch.positions, documents=batch.documents, use_cache=False
        ).last_hidden_state
        chosen: Tensor = states[0].index_select(0, batch.predict_at)
        return chosen


def load_tokenizer(folder: Path, uri: str) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none, or none of the fast kind.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"spec.model: {uri} holds no tokenizer that can be read (tokenizer.json); add it") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"spec.model: {uri} has a tokenizer without tokenizer.json; convert it with transformers")
    if tokenizer.eos_token_id is None:
        raise UserError(f"spec.model: the tokenizer of {uri} names no eos_token, so no answer could ever end; add it")
    return tokenizer


def load_config(spec: ResolvedFineTune, folder: Path) -> Any:
    """The model's configuration, checked against the table of what is supported.

    Raises:
        UserError: it cannot be read, or the combination is not supported.
    """
    from transformers import AutoConfig

    if not folder.is_dir():
        raise UserError(
            f"spec.model: {spec.model.uri} is a file; a model is a folder with config.json, weights and tokenizer"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"spec.model: {spec.model.uri} holds no config.json that transformers can read") from error
    why_not = support.refusal(config.model_type, spec.task, "lora" if spec.method.lora else "full")
    if why_not:
        raise UserError(f"spec.model: {spec.model.uri}: {why_not}")
    for name, plain in _PLAIN.items():
        if getattr(config, name, plain) not in (None, plain):
            raise UserError(f"spec.model: {spec.model.uri}: its config.json sets {name}, which is not supported")
    return config


def load_adapter_config(spec: ResolvedFineTune, adapter: Path) -> Any:
    """The configuration of the adapter to continue from.

    Raises:
        UserError: it cannot be read, or is of a type that cannot be continued.
    """
    from peft import PeftConfig

    assert spec.model.adapter
    uri = spec.model.adapter.uri
    try:
        if not (adapter / "adapter_config.json").is_file():
            raise OSError("peft would look for it on the hub")
        given = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"spec.model.adapter: {uri} is no adapter in PEFT format (adapter_config.json)") from error
    if given.peft_type != "LORA":
        raise UserError(f"spec.model.adapter: {uri} is of type {given.peft_type}; only LORA can be continued")
    return given


def known_classes(config: Any) -> list[str] | None:
    """Names of the classes that a model has a trained head for."""
    if any("SequenceClassification" in name for name in config.architectures or ()):
        return [config.id2label[i] for i in range(config.num_labels)]
    return None


def load(
    spec: ResolvedFineTune,
    folder: Path,
    adapter: Path | None,
    config: Any,
    classes: Sequence[str],
    pad_token: int,
    device: torch.device,
) -> Model:
    """The model on the device, in the type that it computes in where it is frozen and in fp32 where it is trained.

    Args:
        spec: the resolved job.
        folder: the model.
        adapter: one to continue from.
        config: of load_config.
        classes: names of the classes; empty for text generation.
        pad_token: of the tokenizer; transformers' classifiers need it to find a row's last token.
        device: where to.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    attention.register()
    kind = AutoModelForCausalLM
    if classes:
        kind = AutoModelForSequenceClassification
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
        config.problem_type = "single_label_classification"
        config.pad_token_id = pad_token
    compute = compute_type(spec)
    stored = config.dtype or torch.float32
    torch.manual_seed(spec.training.seed)
    try:
        inner, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32 if spec.method.full else compute,
            attn_implementation=attention.NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"spec.model: the weights of {spec.model.uri} cannot be read as safetensors of a {config.model_type}"
        ) from error
    missing = sorted(set(report["missing_keys"]) - {"score.weight"})
    if missing:
        raise UserError(
            f"spec.model: {spec.model.uri} lacks {len(missing)} weights, the first {missing[0]}; the folder is incomplete"
        )
    if spec.method.lora:
        model = Model(_with_adapter(spec, spec.method.lora, inner, adapter), inner, stored)
    else:
        model = Model(inner, inner, stored)
    model.outer.to(device)
    model.outer.train()
    return model


def compute_type(spec: ResolvedFineTune) -> torch.dtype:
    """What forward and backward compute in."""
    return torch.bfloat16 if spec.training.precision == "bf16" else torch.float32


def _with_adapter(spec: ResolvedFineTune, lora: ResolvedLora, inner: Any, adapter: Path | None) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    dropout = float(lora.dropout)
    if adapter is None:
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=dropout,
            use_dora=bool(lora.use_dora),
            use_rslora=bool(lora.use_rslora),
            target_modules=_targets(inner, lora.targets or [ALL_LINEAR]),
            task_type="SEQ_CLS" if spec.task == "text-classification" else "CAUSAL_LM",
            modules_to_save=["score"] if spec.task == "text-classification" else None,
        )
        return get_peft_model(inner, config)
    given = load_adapter_config(spec, adapter)
    _targets(inner, given.target_modules if isinstance(given.target_modules, set | list) else [ALL_LINEAR])
    given.lora_dropout = dropout
    try:
        return PeftModel.from_pretrained(inner, str(adapter), config=given, is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        assert spec.model.adapter
        raise UserError(
            f"spec.model.adapter: {spec.model.adapter.uri} does not fit {spec.model.uri}: it was made for another model"
        ) from error


def _targets(inner: Any, wanted: Sequence[str] | set[str]) -> list[str]:
    """Names of the modules that get an adapter, sorted. The head never does: it is trained in full or not at all."""
    linear = {
        name.rsplit(".", 1)[-1] for name, module in inner.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    if ALL_LINEAR in wanted:
        return sorted(linear)
    unknown = sorted(name for name in wanted if name.rsplit(".", 1)[-1] not in linear)
    if unknown:
        raise UserError(
            f"method.lora.targets: {', '.join(unknown)} is no linear layer of this model that can have an adapter; it has {', '.join(sorted(linear))}"
        )
    return sorted(wanted)
