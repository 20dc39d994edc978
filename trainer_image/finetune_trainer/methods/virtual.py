"""Virtual tokens before each row: prompt and p-tuning as embeddings, prefix tuning as keys and values in every layer.

peft holds and saves them. Its own forward pass puts them before each sequence of a padded batch, and between packed rows they would
leak; `Model.hidden` puts them before each document instead.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import UserError
from ..modelling.models import Model
from ..modelling.virtual import VirtualTokens
from .method import Base, Format, Method
from .peft_folder import write_adapter


class VirtualTokensMethod(Method):
    """prefix, prompt, pTuning."""

    format: ClassVar[Format] = "peft"

    def put_on(self, base: Base) -> Model:
        """See Method."""
        from peft import get_peft_model

        outer: Any = get_peft_model(base.inner, self._config(base))
        for name in base.head_modules:
            base.inner.get_submodule(name).requires_grad_(True)
        virtual = VirtualTokens(outer, self._length, as_keys=self.spec.method.prefix is not None)
        if self.spec.method.prefix and self.spec.method.prefix.initial_text:
            encoder = outer.prompt_encoder["default"]
            encoder.load_prompt_embeddings(self._prefix_of(base, self.spec.method.prefix.initial_text))
        return Model(outer, base.inner, base.stored, virtual=virtual)

    def untouched(self, model: Model) -> AbstractContextManager[Model] | None:
        """See Method: without virtual tokens, which before training are random, or a prompt."""
        return nullcontext(replace(model, virtual=None))

    def save(self, folder: Path, model: Model, weights: dict[str, Tensor]) -> None:
        """See Method. Of a network that makes virtual tokens only what it makes is saved, computed in fp32."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(
            model.outer,
            state_dict={name: tensor.cpu() for name, tensor in weights.items()},
            save_embedding_layers=False,
        )
        encoder = copy.deepcopy(model.outer.prompt_encoder["default"]).float()
        encoder.load_state_dict({name.removeprefix(_ENCODER): weights[name] for name in weights if _ENCODER in name})
        with torch.no_grad():
            numbers = torch.arange(self._length, device=encoder.embedding.weight.device)
            state["prompt_embeddings"] = encoder(numbers[None])[0].cpu()
        config = model.outer.peft_config["default"].to_dict()
        if self.spec.method.prompt:  # how it began, which names a folder of this machine
            config |= {"tokenizer_name_or_path": None, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
        write_adapter(folder, self.spec, state, config)

    @property
    def _length(self) -> int:
        chosen = self.spec.method.prefix or self.spec.method.prompt or self.spec.method.p_tuning
        assert chosen
        return chosen.length

    def _config(self, base: Base) -> Any:
        from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

        method, width = self.spec.method, base.inner.config.hidden_size
        common: dict[str, Any] = {
            "num_virtual_tokens": self._length,
            "task_type": base.peft_task,
        }
        if method.prefix:
            projection = {"prefix_projection": True, "encoder_hidden_size": method.prefix.projection_size or width}
            return PrefixTuningConfig(**common, **(projection if method.prefix.projection else {}))
        if method.p_tuning:
            return PromptEncoderConfig(
                **common,
                encoder_reparameterization_type=method.p_tuning.encoder.upper(),
                encoder_hidden_size=method.p_tuning.hidden_size or width,
            )
        assert method.prompt
        if method.prompt.initial_text is None:
            return PromptTuningConfig(**common, prompt_tuning_init="SAMPLE_VOCAB")
        return PromptTuningConfig(
            **common,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=method.prompt.initial_text,
            tokenizer_name_or_path=str(base.folder),
        )

    def _prefix_of(self, base: Base, text: str) -> Tensor:
        """(length, layers x 2 x width of keys): what the model itself computes for the text, as peft lays a prefix out."""
        from ..modelling.models import load_tokenizer

        tokens: list[int] = load_tokenizer(base.folder, self.spec.model.uri)(text)["input_ids"]
        if not tokens:
            raise UserError("method.prefix.initialText holds no token of this tokenizer; write more")
        repeated = (tokens * (self._length // len(tokens) + 1))[: self._length]
        device = base.inner.get_input_embeddings().weight.device
        with torch.no_grad():
            cache = base.inner.base_model(
                input_ids=torch.tensor([repeated], device=device), use_cache=True
            ).past_key_values
        if any(layer.keys.shape[2] != self._length for layer in cache.layers):
            raise UserError(
                f"method.prefix.length: {self._length} does not fit into the sliding window of {self.spec.model.uri}, and initialText would be cut; lower it"
            )
        flat = [kind[0].transpose(0, 1).flatten(1) for layer in cache.layers for kind in (layer.keys, layer.values)]
        return torch.cat(flat, dim=1).float()


_ENCODER = "prompt_encoder.default."
