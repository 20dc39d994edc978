"""What it is trained and evaluated on."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .. import support
from .common import (
    ApiModel,
    Decimal,
    Fraction,
    Rule,
    SetName,
    Text,
    at_most_one,
)
from .model import Location


class Source(Location):
    """Files with rows: JSON lines, JSON, CSV, TSV, Parquet, Arrow or text, also compressed (.gz, .zst); * matches within a folder. A folder may be one of save_to_disk, or laid out as on the Hugging Face hub, of which one split is taken; hf://org/name is such. For image-classification also a folder of images in sub-folders that are named by class, or such sub-folders by *."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Location.rules,
        Rule(
            "!self.uri.startsWith('oci://')",
            "an image holds no training rows: use pvc://, s3://, hf://, https:// or configmap://",
        ),
        Rule(
            "!(has(self.split) || has(self.config)) || (!self.uri.contains('*') && !self.uri.startsWith('https://'))",
            "split and config choose among the files of a folder: remove them beside a * and for https://",
        ),
    )

    split: Text | None = None
    """Split of a folder that has several. Default train; of sources that are evaluated on validation, else test."""
    config: Text | None = None
    """Config (subset) of a Hugging Face dataset that has several. Default the one that its README.md calls default."""


class TrainingSource(Source):
    """Files to train on, and how much of them."""

    weight: Decimal | None = None
    """Share of the training tokens that comes from here, relative to the other sources. Without weights every row is seen once an epoch."""


class Columns(ApiModel):
    """Names of the columns in your files, where they differ from the usual ones."""

    messages: Text | None = None
    """Chat: a list of {role, content}. Default messages."""
    prompt: Text | None = None
    """Instruction, preference, unpairedPreference: what the user says, or the conversation so far. Default prompt, else instruction."""
    input: Text | None = None
    """Instruction: more context after the prompt, may be empty. Default input."""
    completion: Text | None = None
    """Instruction, unpairedPreference: the answer. Default completion, else output, else response."""
    system: Text | None = None
    """Instruction, preference, unpairedPreference: a system message. Default system."""
    text: Text | None = None
    """Plain text and classification: the text. Default text."""
    label: Text | None = None
    """Classification, of images too: the class, a string or an integer; a list of them for problem multiLabel, a number for regression. unpairedPreference: whether the answer is a good one, true or false. Default label."""
    chosen: Text | None = None
    """Preference: the better answer, text or messages. Default chosen."""
    rejected: Text | None = None
    """Preference: the worse answer. Default rejected."""
    margin: Text | None = None
    """Preference, for objective reward: by how much the better answer is better, a number. Default margin; without that column 0."""
    tokens: Text | None = None
    """Token classification: a list of words. Default tokens, else words."""
    tags: Text | None = None
    """Token classification: a list of tags, one for each word, strings such as B-PER or integers. Default tags, else ner_tags, else labels."""
    question: Text | None = None
    """Question answering: the question. Default question."""
    image: Text | None = None
    """Images: the file's bytes, {bytes, path} as Hugging Face datasets write them, or a path from the folder of the table. Default image."""
    context: Text | None = None
    """Question answering: the text that holds the answer. Default context."""
    answers: Text | None = None
    """Question answering: {text: [...], answer_start: [...]} as in SQuAD, with empty lists where the text does not say. Default answers."""
    source: Text | None = None
    """Summarization and translation: the text to read. Default source, else text, article, document, dialogue. In rows such as {translation: {en: ..., de: ...}} the language to read."""
    target: Text | None = None
    """Summarization and translation: the text to write. Default target, else summary, highlights, translation. In rows such as {translation: {en: ..., de: ...}} the language to write."""


class EvaluationSet(ApiModel):
    """Rows with metrics of their own."""

    name: SetName
    """What its metrics are called by: eval_NAME_loss."""
    sources: Annotated[list[Source], Field(min_length=1, max_length=16)]
    """Where they are."""


class HeldOut(ApiModel):
    """Rows to evaluate on, never trained on."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.fraction) || double(self.fraction) < 1.0",
            "dataset.evaluation.fraction must be below 1, or no row would be left to train on",
        ),
        at_most_one("fraction", "sources", sentence="dataset.evaluation takes fraction or sources, not both"),
        Rule(
            "!(has(self.fraction) && double(self.fraction) == 0.0) || !(has(self.sets) || has(self.general) || has(self.groupBy))",
            "dataset.evaluation: sets and general are measured beside held-out rows, groupBy says which those are, and fraction is 0: raise it",
        ),
        Rule(
            "!(has(self.groupBy) && has(self.sources))",
            "dataset.evaluation.groupBy says which training rows are held out together: remove it, or sources",
        ),
        Rule(
            "!has(self.sets) || self.sets.all(s, s.name != 'general' && self.sets.exists_one(t, t.name == s.name))",
            "each of dataset.evaluation.sets needs a name of its own, other than general",
        ),
    )

    fraction: Fraction | None = None
    """Part of the training rows to hold out, chosen by a hash of each row's content, so that equal rows stay on the same side: "0.02". Default: 2 %, but at least 16 rows, at most 2000, and never more than a tenth. "0" holds nothing out."""
    sources: Annotated[list[Source], Field(min_length=1, max_length=16)] | None = None
    """A set of its own, in place of a part of the training rows."""
    group_by: Text | None = None
    """Column whose equal values stay on the same side, such as the customer or the document that a row comes from."""
    sets: Annotated[list[EvaluationSet], Field(min_length=1, max_length=8)] | None = None
    """More sets, each evaluated whenever the held-out rows are. They decide nothing but gates that name them."""
    general: Annotated[list[Source], Field(min_length=1, max_length=16)] | None = None
    """General data that the model should not forget. Its loss after training minus before, in nats a token, is status.evaluation.forgetting. For objectives sft and pretrain."""


class RandomResizedCrop(ApiModel):
    """A part of each image, scaled to the size that the model takes (Szegedy et al. 2015)."""

    min_scale: Fraction | None = None
    """Smallest part of the image's area. Default "0.08", which is for large sets of photographs; "0.5" and more keeps small objects whole."""


class RandAugment(ApiModel):
    """Operations drawn from fourteen, such as rotation, shear, contrast and solarisation (Cubuk et al. 2020)."""

    operations: Annotated[int, Field(ge=1, le=8)] | None = None
    """Operations on each image. Default 2."""
    magnitude: Annotated[int, Field(ge=0, le=30)] | None = None
    """Their strength, of 30. Default 9."""


class Synonyms(Location):
    """A list of words that may stand for each other, in the format of Solr: a text file with lines such as film, movie or, from left to right only, film => movie, picture."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Location.rules,
        Rule(
            "!self.uri.startsWith('oci://')",
            "an image holds no list of synonyms: use pvc://, s3://, hf://, https:// or configmap://",
        ),
    )

    probability: Fraction | None = None
    """Probability of each word of the list to be replaced. Default "0.1"."""


class Augmentation(ApiModel):
    """Images and texts are changed anew each time they are trained on; evaluation sees them as they are. What is drawn depends on seed, step and row alone."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("mixup", "cutmix", sentence="dataset.augmentation takes mixup or cutmix, not both"),
        Rule(
            "(!has(self.wordDropout) || (double(self.wordDropout) > 0.0 && double(self.wordDropout) < 1.0)) && (!has(self.wordSwap) || double(self.wordSwap) > 0.0)",
            "dataset.augmentation.wordDropout must be above 0 and below 1, and wordSwap above 0: remove it for none",
        ),
        Rule(
            "!has(self.synonyms) || !has(self.synonyms.probability) || double(self.synonyms.probability) > 0.0",
            "dataset.augmentation.synonyms.probability must be above 0: remove synonyms for none",
        ),
        Rule(
            "(!has(self.mixup) || double(self.mixup) > 0.0) && (!has(self.cutmix) || double(self.cutmix) > 0.0)",
            "dataset.augmentation.mixup and cutmix are alpha of a Beta distribution and must be above 0: remove it for none",
        ),
    )

    random_resized_crop: RandomResizedCrop | None = None
    """Train on random parts of the images."""
    horizontal_flip: Fraction | None = None
    """Probability of mirroring left to right: "0.5". Not for what has sides, such as digits and letters."""
    rand_augment: RandAugment | None = None
    """Change shapes and colours."""
    mixup: Decimal | None = None
    """Blend each image, and its class, with another training image; the share is drawn from Beta(mixup, mixup): "0.2" (Zhang et al. 2018)."""
    cutmix: Decimal | None = None
    """Put a rectangle of another training image into each, and mix their classes by area; its share is drawn from Beta(cutmix, cutmix): "1" (Yun et al. 2019)."""
    word_dropout: Fraction | None = None
    """Probability of each word of a text to be left out; one always stays: "0.1" (Wei and Zou 2019). Words are what stands between white space."""
    word_swap: Fraction | None = None
    """Probability of each word of a text to change places with the next: "0.1" (Lample et al. 2018). Not where order tells classes apart."""
    synonyms: Synonyms | None = None
    """Put words of a list of your own in the place of others. training.tokensPerStep counts texts as they are."""


class Dataset(ApiModel):
    """What to learn from."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.train.exists(s, has(s.weight)) || self.train.all(s, has(s.weight))",
            "either every source in dataset.train has a weight or none has",
        ),
        Rule(
            "!self.train.exists(s, has(s.weight)) || self.train.exists(s, has(s.weight) && double(s.weight) > 0.0)",
            "dataset.train: all weights are 0: give at least one source a share",
        ),
    )

    format: support.Format | None = None
    """Shape of the rows. Default: told from their columns."""
    columns: Columns | None = None
    """Names of the columns."""
    prefix: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Summarization and translation: text put before each source and each of evaluation.prompts, as T5 was trained with: "summarize: " or "translate English to German: ". Use the model with the same. Default: nothing."""
    train: Annotated[list[TrainingSource], Field(min_length=1, max_length=32)]
    """Files to train on."""
    evaluation: HeldOut | None = None
    """Rows to evaluate on."""
    augmentation: Augmentation | None = None
    """Random changes of training images, or of training texts of text-classification. Default none."""

    too_long: Literal["truncate", "drop", "split"] | None = None
    """What becomes of a row longer than training.sequenceLength. truncate cuts its end or, of an answer that would not be whole, the beginning of the prompt before it; drop leaves the row out; split makes several rows of a plain text, and no token is lost. Default truncate, of objective pretrain split. A question's context is read in windows instead."""
    min_tokens: Annotated[int, Field(ge=2, le=1_048_576)] | None = None
    """Leave out rows shorter than this, of training and of evaluation."""
    deduplicate: Literal["exact", "near"] | None = None
    """Leave out training rows that equal an earlier training row or a row of evaluation; near: also those that nearly do, with four fifths of their runs of five words in common (estimated by MinHash, Broder 1997). Default: they are only counted, in status.inputs."""
    token_budget: Annotated[int, Field(ge=1, le=1_000_000_000_000_000)] | None = None
    """Train on rows with so many tokens together at most, drawn by training.seed. Default: on all."""
