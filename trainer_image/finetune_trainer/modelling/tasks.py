"""What libraries call a task. Called by models, methods and publish."""

from typing import Final, NamedTuple

from finetune_crds.support import Task


class Names(NamedTuple):
    """Of one task."""

    kind: str
    """transformers' class for loading a model."""
    peft: str | None
    """peft's task_type; None: a model of no particular task."""

    @property
    def architecture(self) -> str:
        """A part of the name of a model's class that has a head for it."""
        return self.kind.removeprefix("AutoModel")


TASKS: Final[dict[Task, Names]] = {
    "text-generation": Names("AutoModelForCausalLM", "CAUSAL_LM"),
    "text-classification": Names("AutoModelForSequenceClassification", "SEQ_CLS"),
    "token-classification": Names("AutoModelForTokenClassification", "TOKEN_CLS"),
    "question-answering": Names("AutoModelForQuestionAnswering", None),  # peft's own for it loses token types
    "summarization": Names("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "translation": Names("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "image-classification": Names("AutoModelForImageClassification", None),
}
