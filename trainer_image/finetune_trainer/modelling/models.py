"""Loading a model, and what the loop needs of it. Called by setup; methods/ puts on it what is trained.

What the rest of the trainer needs of a model is small: hidden states of a flat batch, the head, and which weights are trained.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from finetune_crds import support
from finetune_crds.resolved import ResolvedFineTune
from finetune_crds.support import Task

from ..data.batches import Batch
from ..errors import UserError
from . import anatomy, attention, encoder_decoder, noise, timm_models
from .added_tokens import AddedTokens, grow
from .norms import batch_norms
from .tasks import TASKS
from .virtual import VirtualTokens

log = logging.getLogger("finetune.models")

_PLAIN: dict[str, Any] = {
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "logits_scaling": 1,
    "logit_scale": 1,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "output_router_logits": False,
}
"""What our head and attention do not do, with the value that stands for not doing it."""

_TAUGHT: Final = "WithTeacher"
"""What the names of transformers' classes end with whose second head is for distillation."""
PROBLEMS = {
    "singleLabel": "single_label_classification",
    "multiLabel": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls them."""


class _Rows(nn.Linear):
    """A head whose weight, (vocabulary, size), is computed from a frozen one and trained rows."""

    def __init__(self, weight: Any) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        del self._parameters["weight"]
        self.weight = weight


class Loaded(NamedTuple):
    """A model as it was read."""

    inner: Any
    """The transformers model."""
    reload: Callable[[], Any]
    """Reads it again as it is stored."""
    stored: torch.dtype
    """The type that it is stored in."""
    head_is_new: bool
    """Whether what its head says means nothing yet: it was drawn at random, or has learned classes of other names."""


@dataclass(frozen=True)
class Model:
    """A model that can be trained."""

    outer: Any
    """What holds the trained weights: a PeftModel, or the transformers model itself."""
    inner: Any
    """The transformers model, adapters inside."""
    dtype: torch.dtype
    """What the model was stored in, and is published in if its own weights are trained."""
    virtual: VirtualTokens | None = None
    """Trained tokens before each row."""
    reload: Callable[[], Any] | None = None
    """Reads the transformers model again as it is stored, for what was frozen in another type."""
    noise: float = 0.0
    """training.neftuneNoise."""
    rows: int | None = None
    """Rows that embedding and head have for model.addTokens, where the stored model has fewer."""

    @property
    def head(self) -> nn.Module:
        """The layer that makes logits of tokens of hidden states."""
        head: nn.Module = self.inner.get_output_embeddings()
        tokens = getattr(
            head, "token_adapter", None
        )  # peft's, whose rows are trained; its own forward pass would be by-passed
        if tokens is not None:
            plain = tokens.disable_adapters or tokens.merged
            return head.original_module if plain else _Rows(head.weight)  # type: ignore[return-value]
        wrapped = getattr(head, "modules_to_save", None)  # peft's copy, which is trained and saved with the adapter
        return wrapped["default"] if isinstance(wrapped, nn.ModuleDict) else head

    @property
    def logits_bias(self) -> Tensor | None:
        """(vocabulary): what BART adds to the logits of its head, which has no bias of its own; it is not trained."""
        bias: Tensor | None = getattr(self.inner, "final_logits_bias", None)
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return None if bias is None else bias[0].to(weight.dtype)

    def logits(self, states: Tensor) -> Tensor:
        """(..., size) -> (..., vocabulary)."""
        logits: Tensor = self.head(states)
        return logits if self.logits_bias is None else logits + self.logits_bias

    def hidden(self, batch: Batch) -> Tensor:
        """(predictions, size): hidden states where something is predicted. Logits of all other tokens are never computed."""
        if batch.splits:
            return encoder_decoder.hidden(self.inner, batch)
        with noise.on_embeddings(self.inner, batch.documents.lengths, self.noise if self.outer.training else 0.0):
            if self.virtual:
                arguments, at = self.virtual.inputs(self.inner, batch), self.virtual.moved(batch)
            else:
                positions = batch.positions + anatomy.first_position(self.inner.config)
                arguments = {"input_ids": batch.tokens, "position_ids": positions, "documents": batch.documents}
                at = batch.predict_at
            if batch.types is not None:
                arguments["token_type_ids"] = batch.types
            if not anatomy.of(self.inner.config.model_type).is_encoder:
                arguments["use_cache"] = False
            states = self.inner.base_model(**arguments).last_hidden_state
        if anatomy.takes_mean(self.inner):
            return torch.stack([row.mean(dim=0) for row in states[0].split(list(batch.documents.lengths))])
        chosen: Tensor = states[0].index_select(0, at)
        return chosen

    def image_logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """(images, classes) of what the model takes of images, by name.

        Batch normalisation that is not trained keeps its running statistics and uses them; that of a single image does, too, since one
        image has none of its own.
        """
        several = all(len(one) > 1 for one in inputs.values())
        for norm in batch_norms(self.inner).values():
            norm.train(self.outer.training and norm.weight.requires_grad and several)
        dtype = self.inner.dtype
        given: dict[str, Any] = {
            name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()
        }
        if anatomy.COLOURS in given:  # of a model that could go on drawing
            given["use_cache"] = False
        logits: Tensor = self.inner(**given).logits
        return logits

    def beginning(self, tokens: Tensor) -> tuple[dict[str, Any], int]:
        """The transformers model's arguments for the first tokens of an answer, (1, tokens), and how many positions they take."""
        if self.virtual:
            return self.virtual.beginning(self.inner, tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return {"input_ids": tokens, "position_ids": positions[None]}, tokens.shape[1]


@contextmanager
def inference(model: Model) -> Iterator[None]:
    """In evaluation mode and without gradients, for a while."""
    training = model.outer.training
    model.outer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.outer.train(training)


def checkpoint_blocks(inner: Any) -> None:
    """training.gradientCheckpointing: the transformers model, with what is trained on it, keeps of its blocks their inputs only while it trains.

    Raises:
        UserError: this family cannot, or would count batches twice.
    """
    family = " ".join(
        filter(None, (inner.config.model_type, getattr(inner.config, "architecture", None)))
    )  # of timm a part of it
    if not inner.supports_gradient_checkpointing:
        raise UserError(
            f"training.gradientCheckpointing: transformers has none for models of type {family}; remove it, and lower training.microBatchSize for memory"
        )
    if any(norm.weight.requires_grad for norm in batch_norms(inner).values()):
        raise UserError(
            f"training.gradientCheckpointing: models of type {family} have batch normalisation, whose statistics would count what is computed once more; remove it, and lower training.microBatchSize for memory"
        )
    inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    inner.disable_input_require_grads()  # or the backward pass would go on below the lowest block that is trained
    for module in inner.modules():
        if hasattr(module, "has_relative_attention_bias"):
            # T5's mask would have a gradient, which GPUs cannot give where no query has one.
            module.gradient_checkpointing = False


def load_tokenizer(folder: Path, uri: str, *, generates: bool = True) -> Any:
    """The model's tokenizer.

    Args:
        folder: the model.
        uri: what messages call it.
        generates: whether answers must end.

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
    if generates and tokenizer.eos_token_id is None:
        raise UserError(f"spec.model: the tokenizer of {uri} names no eos_token, so no answer could ever end; add it")
    return tokenizer


def load_image_processor(folder: Path, uri: str, config: Any) -> Any:
    """The model's image processor.

    Args:
        folder: the model.
        uri: what messages call it.
        config: of load_config.

    Raises:
        UserError: there is none, or it makes no image that the model could take.
    """
    from PIL import Image
    from transformers import AutoImageProcessor

    from ..data.timm_images import TimmProcessor

    try:
        found = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="torchvision")
    except Exception as error:  # a field may be anything
        raise UserError(
            f"spec.model: {uri} holds no image processor that can be read (preprocessor_config.json; of a model of timm, pretrained_cfg in config.json); add it"
        ) from error
    if getattr(found, "clusters", ()) is None:
        raise UserError(
            f"spec.model: the image processor of {uri} has no colours that it could tell the model of (clusters in preprocessor_config.json); add them"
        )
    try:
        processor = TimmProcessor(found) if type(found).__name__ == "TimmWrapperImageProcessor" else found
        made = processor(Image.new(anatomy.mode(config), (320, 240)), return_tensors="pt")
    except Exception as error:
        raise UserError(
            f"spec.model: the image processor of {uri} cannot make an image of {anatomy.channels(config)} channels ({type(error).__name__}); correct preprocessor_config.json (of a model of timm, pretrained_cfg in config.json)"
        ) from error
    wanted = anatomy.channels(config)
    if anatomy.takes_pixels(config) and made[anatomy.PIXELS].shape[1] != wanted:
        raise UserError(
            f"spec.model: {uri} takes images of {wanted} channels and its image processor makes them of {made[anatomy.PIXELS].shape[1]}; correct the one or the other"
        )
    return processor


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
    except Exception as error:  # a field may be anything
        raise UserError(f"spec.model: {spec.model.uri} holds no config.json that transformers can read") from error
    if spec.task == "image-classification" and config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None  # the name of a repository would have its kernel fetched; texts have our own
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"spec.model: {spec.model.uri} is quantised already, which cannot be trained; name the model as it was before (method.qlora quantises it)"
        )
    for task in (spec.task, spec.head):
        why_not = support.refusal(config.model_type, task, spec.method.name)
        if why_not:
            whose = "" if task == spec.task else f"objective reward trains a head of {task}: "
            raise UserError(f"spec.model: {spec.model.uri}: {whose}{why_not}")
    why_not = timm_models.refusal(config) if config.model_type == timm_models.FAMILY else None
    if why_not:
        raise UserError(f"spec.model: {spec.model.uri}: {why_not}")
    if config.model_type == anatomy.PERCEIVER and not known_classes(config, spec.task):
        raise UserError(
            f"spec.model: {spec.model.uri} is a Perceiver that tells no classes of images (architectures in its config.json), and the parts that it lacks cannot be made anew; name one that does, such as hf://deepmind/vision-perceiver-learned"
        )
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"spec.model: {spec.model.uri}: its config.json names no decoder_start_token_id, which an answer begins behind; add it"
        )
    augmentation = spec.dataset.augmentation
    if augmentation and (augmentation.mixup or augmentation.cutmix) and not anatomy.takes_pixels(config):
        raise UserError(
            f"dataset.augmentation: two images cannot be mixed into one for models of type {config.model_type}, which take no grid of pixels of one size; remove mixup and cutmix"
        )
    if spec.training.dropout is not None and not dropouts(config):
        raise UserError(f"training.dropout: models of type {config.model_type} have no dropout of their own; remove it")
    for name, plain in _PLAIN.items():
        if getattr(config, name, plain) not in (None, plain):
            raise UserError(f"spec.model: {spec.model.uri}: its config.json sets {name}, which is not supported")
    return config


def dropouts(config: Any) -> dict[str, Any]:
    """The rates of dropout in a model's configuration, as families call them."""
    own = anatomy.of_images(config)
    return {name: rate for name, rate in own.to_dict().items() if "dropout" in name or name.endswith("_pdrop")}


def known_classes(config: Any, task: Task) -> list[str] | None:
    """Names of the classes that a model has a trained head for."""
    own = any(TASKS[task].architecture in name for name in config.architectures or ())
    if own or timm_models.has_classes(config):
        return [config.id2label[i] for i in range(config.num_labels)]
    return None


def load(
    spec: ResolvedFineTune,
    folder: Path,
    config: Any,
    classes: Sequence[str],
    pad_token: int | None,
    *,
    own_weights: bool,
    quantization: Any,
    device: torch.device,
    added: AddedTokens | None = None,
) -> Loaded:
    """The transformers model, on the CPU, or quantised on the device, in the type that it computes in, or in fp32 if its own weights are trained.

    Args:
        spec: the resolved job.
        folder: the model.
        config: of load_config.
        classes: names of the classes; empty where there are none.
        pad_token: of the tokenizer; transformers' classifiers need it to find a row's last token. None for images.
        own_weights: whether its own weights are trained.
        quantization: transformers' quantisation config, or None.
        device: that trains; if it is meta, the files' names and shapes are read, and no weight.
        added: model.addTokens.
    """
    import transformers

    attention.register()
    shapes_only = device.type == "meta"
    kind = getattr(transformers, TASKS[spec.head].kind)
    there = known_classes(config, spec.head) if classes else None
    replaces_head = spec.task == "image-classification" and bool(there) and there != list(classes)
    if there and replaces_head:
        log.info(
            "the head of %s for %d classes is replaced by a new one for the %d classes of the data",
            spec.model.uri, len(there), len(classes),
        )  # fmt: skip
    elif there and len(there) != len(classes):
        raise UserError(
            f"spec.model: {spec.model.uri} tells {len(there)} classes apart and the rows have {len(classes)}; name a model without a head, or correct dataset.columns.label"
        )
    taught = [name for name in config.architectures or () if name.endswith(_TAUGHT)]
    if taught and not own_weights:
        raise UserError(
            f"spec.model: {spec.model.uri} has a second head, learned from a teacher ({taught[0]}), and an adapter for one without it could not be opened on it; use method full, freeze or gradualUnfreezing, or save it as {taught[0].removesuffix(_TAUGHT)} first"
        )
    if timm_models.says_classes_twice(config) and not own_weights:
        raise UserError(
            f"spec.model: model_args in the config.json of {spec.model.uri} has num_classes, with which transformers cannot open the model, and so no adapter on it; remove it there, or use method full, freeze or gradualUnfreezing"
        )
    if taught:
        config.architectures = []  # the family's plain classifier
    if classes:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
        if config.model_type == timm_models.FAMILY:
            timm_models.name_classes(config, classes)
    if spec.head == "text-classification":
        config.problem_type = PROBLEMS[spec.problem]
        config.pad_token_id = pad_token
        if spec.problem == "regression":
            config.num_labels = 1
    stored = config.dtype or torch.float32
    head_is_new = bool(there) and not _same_classes(there or [], classes)

    def read(dtype: torch.dtype, **options: Any) -> Any:
        torch.manual_seed(spec.training.seed)
        if shapes_only:
            options["device_map"] = "meta"
        if spec.task == "image-classification":
            options["ignore_mismatched_sizes"] = replaces_head
        else:
            options["attn_implementation"] = "sdpa" if config.is_encoder_decoder else attention.NAME
        drawn = copy.deepcopy(config)
        if spec.training.dropout is not None:
            anatomy.of_images(drawn).update(dict.fromkeys(dropouts(config), float(spec.training.dropout)))
        try:
            inner, report = kind.from_pretrained(
                folder,
                config=drawn,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"spec.model: the weights of {spec.model.uri} cannot be read as safetensors of a {config.model_type}"
            ) from error
        anatomy.of_images(inner.config).update(dropouts(config))  # what is published opens as the model did
        nonlocal head_is_new
        heads = tuple(f"{name}." for name in anatomy.head(config, spec.head)) or ("-",)
        head_is_new |= any(name.startswith(heads) for name in report["missing_keys"])
        missing = sorted(name for name in report["missing_keys"] if not name.startswith(heads))
        if missing:
            raise UserError(
                f"spec.model: {spec.model.uri} lacks {len(missing)} weights, the first {missing[0]}; the folder is incomplete"
            )
        if added:
            grow(inner, added)
        if replaces_head and not shapes_only:
            for name in anatomy.head(config, spec.task):
                _begin_anew(inner, inner.get_submodule(name))
        return inner

    options = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device}}
    inner = read(torch.float32 if own_weights else compute_type(spec), **options)
    norms = batch_norms(inner)
    if norms and inner.dtype != torch.float32 and not shapes_only:  # what was rounded would stay so
        exact = batch_norms(read(torch.float32))
        for name, norm in norms.items():
            norm.float().load_state_dict(exact[name].state_dict())
    if spec.task == "image-classification":
        _compute_tables_in(inner, compute_type(spec))
    return Loaded(inner, lambda: read(stored), stored, head_is_new)


def _same_classes(known: Sequence[str], classes: Sequence[str]) -> bool:
    """Whether a head's classes are those of the rows. One that was trained on numbers, and saved without names, has transformers' own."""
    numbered = [f"LABEL_{i}" for i in range(len(known))]
    return list(classes) in (list(known), [str(i) for i in range(len(known))] if known == numbered else known)


def _begin_anew(inner: Any, head: nn.Module) -> None:
    """Draws what tells classes in a head as in a model that has none: in one of as many classes lie those of other classes."""
    for module in head.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False  # type: ignore[attr-defined]  # transformers' mark of what was read
        inner._init_weights(module)


def _compute_tables_in(inner: Any, dtype: torch.dtype) -> None:
    """Puts what a model makes for itself and never saves, such as the distances in a window of Swin V2, into the type of the layers that take it."""
    for module in inner.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def compute_type(spec: ResolvedFineTune) -> torch.dtype:
    """What forward and backward compute in."""
    return torch.bfloat16 if spec.training.precision == "bf16" else torch.float32
