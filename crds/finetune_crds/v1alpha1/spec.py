"""What a user asks for. Past 300 lines because this one file is the API; docstrings are what `kubectl explain` prints.

A field is here only if it works. Defaults that depend on the method, the model or the hardware are not in the schema but in
`finetune_crds.resolution`, so that a later release can choose better without touching jobs that already run.
"""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from .. import support
from . import methods
from .common import (
    ApiModel,
    Decimal,
    Fraction,
    Name,
    Quantity,
    Raw,
    Rule,
    SignedDecimal,
    Text,
    at_most_one,
    exactly_one,
)
from .methods import Method

Metric = Literal[
    "eval_loss",
    "eval_accuracy",
    "eval_f1",
    "eval_exact_match",
    "eval_pearson",
    "eval_mse",
    "eval_rouge1",
    "eval_rouge2",
    "eval_rougeL",
    "eval_chrf",
    "eval_bleu",
    "eval_margin",
    "eval_reward",
]
Key = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]


def _cel_list(names: tuple[str, ...]) -> str:
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"


class SecretReference(ApiModel):
    """A Secret in the job's namespace. It is mounted into the training pod and read by nobody else."""

    name: Name
    """Name of the Secret. Keys read: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN for s3, token for hf and https, .dockerconfigjson (type kubernetes.io/dockerconfigjson) or username and password for oci."""


class Location(ApiModel):
    """A place for a model, data or results."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.uri.matches('^(pvc|s3|https|hf|oci|configmap|file)://[^/]')  || self.uri.startsWith('file:///')",
            "uri must be pvc://claim/path, s3://bucket/prefix, https://host/path, hf://org/name@revision, oci://registry/repository:tag or configmap://name/key",
        ),
        Rule("!self.uri.contains('/../') && !self.uri.endsWith('/..')", "uri must not climb with '..'"),
        Rule(
            "!(has(self.endpoint) || has(self.region)) || self.uri.startsWith('s3://') || (self.uri.matches('^(hf|oci)://') && !has(self.region))",
            "endpoint is for s3://, hf:// and oci:// locations and region for s3:// only: remove them from this uri",
        ),
        Rule(
            "!has(self.secretRef) || self.uri.matches('^(s3|https|hf|oci)://')",
            "secretRef is for s3://, https://, hf:// and oci:// locations: a claim or ConfigMap needs no credentials",
        ),
        Rule(
            "!self.uri.matches('^[a-z0-9]+://[^/]*@.*:') && !self.uri.matches('^(https|s3)://[^/]*@')",
            "credentials do not belong in a uri: use secretRef",
        ),
        Rule(
            "!self.uri.startsWith('oci://') || self.uri.matches('^oci://[^/@]+/[a-z0-9]+([._/-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(@sha256:[0-9a-f]{64})?$')",
            "an oci:// uri is oci://registry/repository:tag or oci://registry/repository@sha256:digest, with a repository of lower-case letters",
        ),
    )

    cluster_rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!self.uri.startsWith('file://')",
            "file:// works with 'finetune local' only: put the files on a claim and use pvc://claim/path",
        ),
    )

    uri: Annotated[str, Field(min_length=6, max_length=1024)]
    """Where: pvc://claim/path, s3://bucket/prefix, https://host/path, hf://org/name@revision (branch, tag or whole commit hash), oci://registry/repository:tag or @sha256:digest, configmap://name/key."""
    secret_ref: SecretReference | None = None
    """Credentials for this location, by Secret. Without it the pod's service account (cloud identity) or nothing is used."""
    endpoint: Annotated[str, Field(max_length=256, pattern=r"^https?://[^/@]+(/.*)?$")] | None = None
    """Another server that speaks the same protocol: an S3 store such as http://minio.storage:9000, a mirror of the Hugging Face hub, or where the registry of an oci:// uri is reached, such as http://registry.tools:5000 without TLS."""
    region: Annotated[str, Field(max_length=64)] | None = None
    """Region of the S3 bucket. Default: AWS_REGION of the pod, else us-east-1."""


def _if_uri(rule: Rule) -> Rule:
    return Rule(f"!has(self.uri) || ({rule.cel})", rule.message)


class Reference(ApiModel):
    """A place, or what another job puts there."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *(_if_uri(rule) for rule in Location.rules),
        Rule(
            "!has(self.job) || !(has(self.endpoint) || has(self.region))",
            "endpoint and region of a job's output are known: remove them beside job",
        ),
    )
    cluster_rules: ClassVar[tuple[Rule, ...]] = tuple(_if_uri(rule) for rule in Location.cluster_rules)

    uri: Annotated[str, Field(min_length=6, max_length=1024)] | None = None
    """Where: pvc://claim/path, s3://bucket/prefix, hf://org/name@revision (branch, tag or whole commit hash), oci://registry/repository:tag or @sha256:digest."""
    job: Annotated[Name, Field(max_length=40)] | None = None
    """Instead of uri: the output of this FineTuneJob of the same namespace. Training waits until it is Complete, and reads what it published then."""
    secret_ref: SecretReference | None = None
    """Credentials to read it with, by Secret; also for the output of a job, whose own Secret may write. Without it the pod's service account (cloud identity) or nothing is used."""
    endpoint: Annotated[str, Field(max_length=256, pattern=r"^https?://[^/@]+(/.*)?$")] | None = None
    """Another server that speaks the same protocol, as for any location."""
    region: Annotated[str, Field(max_length=64)] | None = None
    """Region of the S3 bucket."""

    def location(self) -> Location | None:
        """The place, once it is known."""
        if isinstance(self, Location):
            return self
        given = self.model_dump(include={"uri", "secret_ref", "endpoint", "region"})
        return Location.model_validate(given) if self.uri else None


class Adapter(Reference):
    """A LoRA adapter in PEFT format."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Reference.rules,
        exactly_one("uri", "job", sentence="model.adapter needs exactly one of uri and job"),
    )


class AddedTokens(ApiModel):
    """Tokens that the tokenizer does not have."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one("tokens", "file", sentence="model.addTokens needs exactly one of tokens and file"),
    )

    tokens: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=1024)]
        | None
    ) = None
    """The tokens themselves."""
    file: Location | None = None
    """A text file with a token a line."""
    special: bool | None = None
    """Whether they are left out where text is made of what the model writes, as markers are. Default false."""


class Model(Reference):
    """The model to start from: a transformers folder with config.json, safetensors weights and a tokenizer."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Reference.rules,
        exactly_one("uri", "job", sentence="model needs exactly one of uri and job"),
        Rule(
            "!has(self.uri) || !self.uri.startsWith('configmap://')",
            "a model does not fit into a ConfigMap: use pvc://, s3://, hf:// or oci://",
        ),
        Rule(
            "!has(self.uri) || !self.uri.startsWith('https://')",
            "a model is a folder and https:// names one file: use hf://, s3://, oci:// or pvc://",
        ),
        at_most_one(
            "adapter",
            "addTokens",
            sentence="model.adapter was trained without the tokens of model.addTokens: merge it into a model first, or remove one of the two",
        ),
        Rule(
            "!has(self.addTokens) || !has(self.addTokens.file) || !self.addTokens.file.uri.startsWith('oci://')",
            "an image holds no list of tokens: use pvc://, s3://, hf://, https:// or configmap:// for model.addTokens.file",
        ),
    )

    adapter: Adapter | None = None
    """A LoRA adapter in PEFT format to continue from: its place, or the job that made it. Its rank, alpha and targets are kept; method.lora or method.qlora must not say otherwise."""
    add_tokens: AddedTokens | None = None
    """Tokens to add to the tokenizer, such as names of a domain or markers. Their rows in embedding and head begin as the mean of what stood for them before, and are trained. One that is there already is refused."""


class Source(Location):
    """Files with training rows: JSON lines, JSON, CSV, TSV, Parquet or text, also compressed (.gz, .zst); * matches within a folder. For image-classification also a folder of images in sub-folders that are named by class, or such sub-folders by *."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Location.rules,
        Rule(
            "!self.uri.startsWith('oci://')",
            "an image holds no training rows: use pvc://, s3://, hf://, https:// or configmap://",
        ),
    )

    weight: Decimal | None = None
    """Share of the training tokens that comes from here, relative to the other sources. Without weights every row is seen once an epoch."""


class Columns(ApiModel):
    """Names of the columns in your files, where they differ from the usual ones."""

    messages: Text | None = None
    """Chat: a list of {role, content}. Default messages."""
    prompt: Text | None = None
    """Instruction, preference: what the user says, or the conversation so far. Default prompt, else instruction."""
    input: Text | None = None
    """Instruction: more context after the prompt, may be empty. Default input."""
    completion: Text | None = None
    """Instruction, unpairedPreference: the answer. Default completion, else output, else response."""
    system: Text | None = None
    """Instruction: a system message. Default system."""
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


SetName = Annotated[str, Field(min_length=1, max_length=24, pattern=r"^[a-z][a-z0-9]*$")]


class EvaluationSet(ApiModel):
    """Rows with metrics of their own."""

    name: SetName
    """What its metrics are called by: eval_NAME_loss."""
    sources: Annotated[list[Source], Field(min_length=1, max_length=16)]
    """Where they are."""


class HeldOut(ApiModel):
    """Rows to evaluate on, never trained on."""

    rules: ClassVar[tuple[Rule, ...]] = (
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
    )

    format: support.Format | None = None
    """Shape of the rows. Default: told from their columns."""
    columns: Columns | None = None
    """Names of the columns."""
    prefix: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Summarization and translation: text put before each source and each of evaluation.samples, as T5 was trained with: "summarize: " or "translate English to German: ". Use the model with the same. Default: nothing."""
    train: Annotated[list[Source], Field(min_length=1, max_length=32)]
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


_BETA = "beta must be above 0, or nothing would be learned"


class Sft(ApiModel):
    """Supervised fine-tuning: next-token cross-entropy."""

    loss_on: Literal["assistant", "all"] | None = None
    """Which tokens are learned: the assistant's answers (default for chat and instruction rows) or all (plain text)."""


class Pretrain(ApiModel):
    """Next-token cross-entropy of plain text, to learn a domain or a language. A text longer than sequenceLength becomes several rows; no token is lost."""


class Dpo(ApiModel):
    """Direct preference optimisation: the better of two answers gains on the worse, relative to the model before training (Rafailov et al. 2023)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("!has(self.beta) || double(self.beta) > 0.0", f"objective.dpo.{_BETA}"),
        Rule(
            "!has(self.labelSmoothing) || double(self.labelSmoothing) < 0.5",
            "objective.dpo.labelSmoothing is the part of pairs that are the wrong way round: below 0.5",
        ),
        Rule(
            "!has(self.labelSmoothing) || !has(self.loss) || self.loss == 'sigmoid'",
            "objective.dpo.labelSmoothing is for loss sigmoid: remove it",
        ),
    )

    loss: Literal["sigmoid", "ipo", "hinge"] | None = None
    """sigmoid (the paper's), ipo (Azar et al. 2023: a margin to reach, not to exceed, of answers' mean log-probabilities) or hinge (Zhao et al. 2023). Default sigmoid."""
    beta: Decimal | None = None
    """Strength of the pull towards the model before training: small values let it go far. Default "0.1"."""
    label_smoothing: Fraction | None = None
    """Part of the pairs taken to be the wrong way round (conservative DPO, Mitchell 2023). Default "0"."""


class Orpo(ApiModel):
    """Odds ratio preference optimisation: learn the better answer and tell it from the worse in one go, without a reference (Hong et al. 2024)."""

    beta: Decimal | None = None
    """Weight of the odds ratio, the paper's lambda. Default "0.1"."""


class Kto(ApiModel):
    """Kahneman-Tversky optimisation: single answers, each marked good or bad (Ethayarajh et al. 2024)."""

    rules: ClassVar[tuple[Rule, ...]] = (Rule("!has(self.beta) || double(self.beta) > 0.0", f"objective.kto.{_BETA}"),)

    beta: Decimal | None = None
    """Strength of the pull towards the model before training. Default "0.1"."""
    desirable_weight: Decimal | None = None
    """Weight of good answers. The paper advises that weight times count of the good be 1 to 4/3 that of the bad. Default "1"."""
    undesirable_weight: Decimal | None = None
    """Weight of bad answers. Default "1"."""


class Reward(ApiModel):
    """A reward model: a classifier with one output, the score of a conversation, higher for the better of two answers (Bradley and Terry 1952)."""

    centering: Decimal | None = None
    """Weight of the squared sum of both scores, which keeps scores around 0 (Eisenstein et al. 2023, who use "0.01"). Default "0"."""


class RegexReward(ApiModel):
    """1 where a regular expression matches the answer, else 0."""

    pattern: Annotated[str, Field(min_length=1, max_length=1024)]
    """The expression, in Python's syntax; a dot matches line breaks too."""
    match: Literal["search", "full"] | None = None
    """Whether it must match somewhere in the answer (search, the default) or the whole of it (full)."""


class JsonSchemaReward(ApiModel):
    """1 where the answer is JSON, and nothing but JSON, that a schema holds for, else 0."""

    json_schema: Annotated[str, Field(alias="schema", min_length=2, max_length=16_384)]
    """The JSON schema, as text, by its own $schema or draft 2020-12. It may refer to parts of itself only."""


class ReferenceReward(ApiModel):
    """1 where the answer is that of a column of the data, else 0: numbers by value, other text letter by letter."""

    column: Text
    """Column that holds the right answer."""
    pattern: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Regular expression whose first group (without groups, the whole match) is the answer; its last match counts. Applied to what the model says and, where it matches there, to the column: "#### (.+)" for GSM8K. Default: the whole text."""


class RewardModel(Location):
    """A model that scores conversations: a transformers folder of a classifier with one output and a tokenizer, or the base of an adapter."""

    adapter: Location | None = None
    """The adapter in PEFT format that objective reward with method lora publishes; uri is then its base."""


class RewardSource(ApiModel):
    """One reward of an answer. Exactly one kind."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            "regex",
            "jsonSchema",
            "reference",
            "model",
            "entryPoint",
            sentence="each of objective.grpo.rewards needs exactly one of: regex, jsonSchema, reference, model, entryPoint",
        ),
        Rule(
            "has(self.entryPoint) == (has(self.allowUserCode) && self.allowUserCode)",
            "objective.grpo.rewards: entryPoint runs code of yours with the trainer's rights, and needs allowUserCode: true (and nothing else does)",
        ),
    )

    name: SetName
    """What its metric is called by: reward_NAME, and eval_reward_NAME of held-out prompts."""
    weight: SignedDecimal | None = None
    """Its weight in the sum of all rewards; below 0 for what should not be. Default "1"."""
    regex: RegexReward | None = None
    """A regular expression."""
    json_schema: JsonSchemaReward | None = None
    """A JSON schema."""
    reference: ReferenceReward | None = None
    """The right answer, in a column of the data."""
    model: RewardModel | None = None
    """A reward model, such as objective reward publishes."""
    entry_point: (
        Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")] | None
    ) = None
    """A Python function of runtime.image, "package.module:function", called as TRL calls reward functions: with prompts, completions, completion_ids and each column of the rows as lists. It returns a number for each completion, and must be a function of them alone, or a resumed run would not end as one that was never stopped."""
    allow_user_code: bool | None = None
    """Must be true with entryPoint."""

    @property
    def kind(self) -> str:
        """Which kind is set."""
        return next(
            kind for kind in ("regex", "json_schema", "reference", "model", "entry_point") if getattr(self, kind)
        )


class Grpo(ApiModel):
    """Group relative policy optimisation: the model answers each prompt several times, and answers with a higher reward than the others' mean become likelier (Shao et al. 2024)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.rewards.all(r, self.rewards.exists_one(s, s.name == r.name))",
            "each of objective.grpo.rewards needs a name of its own",
        ),
        Rule(
            "!has(self.temperature) || double(self.temperature) > 0.0",
            "objective.grpo.temperature must be above 0: without chance all answers to a prompt would be the same",
        ),
        Rule(
            "!has(self.epsilonHigh) || !has(self.epsilon) || double(self.epsilonHigh) >= double(self.epsilon)",
            "objective.grpo.epsilonHigh is the upper bound and must not be below epsilon: raise it, or remove it",
        ),
    )

    rewards: Annotated[list[RewardSource], Field(min_length=1, max_length=8)]
    """What answers are judged by. The reward of an answer is their weighted sum."""
    generations: Annotated[int, Field(ge=2, le=256)] | None = None
    """Answers to each prompt, the group. Default 8."""
    max_completion_length: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Longest answer in tokens; the prompt has what it leaves of training.sequenceLength. Default 512, or half of sequenceLength where that is less."""
    temperature: Decimal | None = None
    """Of sampling; held-out prompts are answered greedily. Default "1"."""
    loss: Literal["dapo", "grpo", "dr_grpo"] | None = None
    """What the mean is over: dapo (Yu et al. 2025), all tokens of the step; grpo, the tokens of each answer and then the answers; dr_grpo (Liu et al. 2025), answers of maxCompletionLength. Default dapo."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Advantages are divided by the standard deviation of the group's rewards, of all rewards of the step, or not. Default group; none with loss dr_grpo, as its authors advise."""
    beta: Decimal | None = None
    """Weight of the KL divergence from the model before training. Default "0"."""
    epsilon: Fraction | None = None
    """The ratio of probabilities counts down to 1 - epsilon. Without effect with iterations 1. Default "0.2"."""
    epsilon_high: Decimal | None = None
    """It counts up to 1 + epsilonHigh; DAPO's authors use "0.28". Default: epsilon."""
    iterations: Annotated[int, Field(ge=1, le=64)] | None = None
    """Optimizer steps on each set of answers. Evaluations and checkpoints come between sets: their intervals are rounded up to a multiple. Default 1."""
    generation_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Answers that one GPU writes at a time. Changes memory and speed, never the result beyond rounding. Default 64."""


class Classification(ApiModel):
    """Cross-entropy of classes, or squared error of numbers."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one(
            "balanceClasses",
            "classWeights",
            sentence="objective.classification takes balanceClasses or classWeights, not both",
        ),
        Rule(
            "!(has(self.problem) && self.problem == 'regression') || !(has(self.balanceClasses) || has(self.classWeights))",
            "objective.classification: problem regression has no classes to weigh: remove balanceClasses and classWeights",
        ),
    )

    problem: support.Problem | None = None
    """What a text has: one class (default), any number of classes, or a number. Tokens and images have one class."""
    balance_classes: bool | None = None
    """Weigh each class by rows / (classes x rows of the class), so that rare ones count as much as frequent ones. Default false."""
    class_weights: Annotated[dict[str, Decimal], Field(min_length=1, max_length=256)] | None = None
    """Weights in the loss by class; those not named have 1."""


class Objective(ApiModel):
    """What is optimised. Exactly one."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(*support.OBJECTIVES, sentence=f"objective needs exactly one of: {', '.join(support.OBJECTIVES)}"),
    )

    sft: Sft | None = None
    """Supervised fine-tuning: for text-generation."""
    pretrain: Pretrain | None = None
    """Plain text, to learn a domain: for text-generation."""
    dpo: Dpo | None = None
    """Pairs of answers, relative to the model before training: for text-generation."""
    orpo: Orpo | None = None
    """Pairs of answers, learned and told apart in one go: for text-generation."""
    kto: Kto | None = None
    """Single answers marked good or bad: for text-generation."""
    reward: Reward | None = None
    """Pairs of answers, to learn a score from: for text-generation. The result is a classifier with one output."""
    grpo: Grpo | None = None
    """Reinforcement learning from rewards of the model's own answers: for text-generation."""
    classification: Classification | None = None
    """For text-classification, token-classification and image-classification."""

    @property
    def name(self) -> str:
        """The one that is set."""
        (name,) = self.to_wire()
        return name


class AdamW(ApiModel):
    """AdamW (Loshchilov and Hutter 2019)."""

    beta1: Fraction | None = None
    """Decay of the mean of gradients. Default "0.9"."""
    beta2: Fraction | None = None
    """Decay of the mean of their squares. Default "0.999"."""
    epsilon: Decimal | None = None
    """Added to the root of the latter. Default "1e-8"."""
    bits: Literal[8, 32] | None = None
    """Bits of each of the two means: 8 (Dettmers et al. 2022) takes two bytes a trained weight in place of eight, and rounds. Default 32."""
    paged: bool | None = None
    """Keep the two means in memory that GPU and host share: what does not fit beside a peak of activations moves to the host, and comes back for the update, in place of running out of GPU memory. The same results to the last bit. Needs a GPU. Default false."""


class Optimizer(ApiModel):
    """Which optimizer. Exactly one."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one("adamw", sentence="training.optimizer needs exactly one of: adamw"),
    )

    adamw: AdamW | None = None
    """AdamW (Loshchilov and Hutter 2019): the default."""


class Training(ApiModel):
    """Hyperparameters."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("epochs", "maxSteps", sentence="training takes epochs or maxSteps, not both"),
        at_most_one(
            "batchSize", "tokensPerStep", sentence="training takes batchSize (sequences) or tokensPerStep, not both"
        ),
        at_most_one("warmupRatio", "warmupSteps", sentence="training takes warmupRatio or warmupSteps, not both"),
        at_most_one(
            "microBatchSize",
            "accumulationSteps",
            sentence="training takes microBatchSize or accumulationSteps, not both: each follows from the other",
        ),
    )

    epochs: Decimal | None = None
    """Passes over the training rows. Default "3"; one for objective pretrain, dpo, orpo, kto, reward and grpo."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps, instead of epochs."""
    learning_rate: Decimal | None = None
    """Peak learning rate. Default "2e-4" for lora and qlora, "2e-5" for full and gradualUnfreezing, "5e-5" for freeze, "1e-4" for adapter, "1e-2" for prefix, "5e-5" for prefix with projection, "3e-2" for prompt, "1e-3" for pTuning, "3e-3" for ia3. Objective dpo, kto and grpo: a twentieth of that, orpo two fifths, reward half."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """How the learning rate falls after warm-up: to 0 along a cosine (default) or a line, or not."""
    warmup_ratio: Fraction | None = None
    """Part of all steps in which the learning rate rises from 0. Default "0.03"."""
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """Steps in which the learning rate rises, instead of a ratio."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Rows in one optimizer step over all GPUs (a row is a sequence, with packing a pack of them, of objective grpo a prompt with all its answers). Default 16."""
    tokens_per_step: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Most non-padding input tokens in one optimizer step over all GPUs, instead of batchSize."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Rows in one forward pass of one GPU. Changes memory and speed, never the result beyond rounding. Batch normalisation that is trained takes its statistics from these rows, so there it does change the result. Default: 1 when packed, 1 prompt with its answers of objective grpo, 4 pairs of answers, 32 images, else 8."""
    accumulation_steps: Annotated[int, Field(ge=1, le=65_536)] | None = None
    """Forward passes of one GPU in one optimizer step, instead of microBatchSize."""
    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest row in tokens, of a pair of answers each with its prompt; longer ones are cut, and status says how many. Default: 1024, or what the model has positions for where that is less."""
    packing: bool | None = None
    """Put several rows into one sequence without letting them see each other. Default true for objective sft and pretrain with a family that supports it."""
    precision: Literal["bf16", "fp32"] | None = None
    """What forward and backward compute in. Trained weights always have fp32 masters. Default bf16 on GPUs, fp32 without."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] | None = None
    """Data order, initial adapter and dropout are functions of it. Default 42."""
    optimizer: Optimizer | None = None
    """The optimizer and its numbers. Default adamw."""
    weight_decay: Decimal | None = None
    """AdamW's decay, on matrices only. Default "0" for adapters, "0.01" where the model's own weights are trained (full, freeze, gradualUnfreezing)."""
    label_smoothing: Fraction | None = None
    """Part of each target that is spread over all tokens or classes (Szegedy et al. 2016): "0.1". Held-out losses are without. Default "0"."""
    neftune_noise: Decimal | None = None
    """NEFTune (Jain et al. 2023): uniform noise on the embeddings of training rows, scaled by this over the root of tokens times width; 5 is usual. Default "0"."""
    l2_sp: Decimal | None = None
    """L2-SP (Li et al. 2018): decay towards the weights that training began with in place of 0, against forgetting; a fresh head is left out. Decoupled from the gradient as AdamW's decay is. Default "0"."""
    max_grad_norm: Decimal | None = None
    """Gradients are scaled down to this global L2 norm; "0" switches it off. Default "1"."""


class EarlyStopping(ApiModel):
    """Stop when the metric no longer improves."""

    patience: Annotated[int, Field(ge=1, le=1000)]
    """Evaluations without improvement before training ends."""
    min_delta: Decimal | None = None
    """Improvement that counts. Default "0"."""


class Sample(ApiModel):
    """A fixed prompt, answered before training, at each evaluation and after it; the answers are in samples.jsonl in the output, and side by side in evaluation.html."""

    prompt: Annotated[str, Field(min_length=1, max_length=8192)]
    """What the user says; the model's chat template is applied when it has one. For summarization and translation the text to read."""


class FewShot(ApiModel):
    """What prompting alone gives: the model before training, with examples from the training rows in its prompt. Taken once, before the first step; evaluation.html compares it with the result."""

    examples: Annotated[int, Field(ge=0, le=32)] | None = None
    """Examples in the prompt, as many of them as half of sequenceLength holds. Default 4; 0 leaves it out."""
    rows: Annotated[int, Field(ge=0, le=2000)] | None = None
    """Held-out rows whose answers are measured after the examples, and at the end without them, for text-generation. Default 64, 0 where nothing is held out."""


class Slice(ApiModel):
    """Held-out rows with a value in a column, measured apart so that harm to a group is seen."""

    name: SetName
    """What its metrics are called by: eval_loss.NAME."""
    column: Text
    """Column of the rows."""
    value: Text
    """Its value; of numbers and booleans as JSON writes them."""


class Benchmark(Location):
    """A task of lm-evaluation-harness: a folder with its YAML file and its data, asked of the model before and after training."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Location.rules,
        Rule(
            "self.uri.matches('^(pvc|s3|configmap|file)://')",
            "evaluation.benchmarks: a task is a folder of files: use pvc://, s3:// or configmap://",
        ),
    )

    name: SetName
    """What its metrics are called by: benchmark/NAME/acc."""
    task: Text | None = None
    """Which task, as its file calls it. Default: the only one there."""
    few_shot: Annotated[int, Field(ge=0, le=64)] | None = None
    """Solved examples before each question, drawn from the task's few-shot or training split. Default: what the task says, else 0."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Ask so many of its first questions only. Default: all."""
    chat_template: bool | None = None
    """Ask through the model's chat template. Default false, as in the harness."""
    allow_user_code: bool | None = None
    """Run Python of the folder, which tasks name with !function, in the training container with all that it may do. Default false: such a task is refused."""


class Gate(ApiModel):
    """What the result must reach to be published."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.min) || has(self.max) || has(self.maxRegression)",
            "a gate of evaluation.gates needs min, max or maxRegression",
        ),
        at_most_one(
            "set",
            "slice",
            "benchmark",
            sentence="a gate of evaluation.gates names a set, a slice or a benchmark, only one of them",
        ),
        Rule(
            f"has(self.benchmark) || self.metric in {_cel_list(get_args(Metric))}",
            f"a gate of evaluation.gates judges {', '.join(get_args(Metric))}, or with benchmark a metric of its task",
        ),
    )

    metric: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z][-._a-zA-Z0-9]*$")]
    """What is judged: one of the metrics that evaluation.metric may be, or with benchmark one of its task, such as acc or exact_match.FILTER."""
    set: SetName | None = None
    """One of dataset.evaluation.sets, or general. Default: the held-out rows."""
    slice: SetName | None = None
    """One of evaluation.slices."""
    benchmark: SetName | None = None
    """One of evaluation.benchmarks."""
    min: SignedDecimal | None = None
    """Least value."""
    max: SignedDecimal | None = None
    """Largest value."""
    max_regression: Decimal | None = None
    """How much worse than before training it may be: "0" for not at all. A head that is new is compared with always answering with the training rows' most frequent class or mean."""

    @property
    def name(self) -> str:
        """The metric's full name."""
        if self.benchmark:
            return f"benchmark/{self.benchmark}/{self.metric}"
        name = self.metric.replace("eval_", f"eval_{self.set}_", 1) if self.set else self.metric
        return f"{name}.{self.slice}" if self.slice else name


class Evaluation(ApiModel):
    """When and how to evaluate."""

    every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Evaluate each time this many steps are done; before the first and after the last step it is done always."""
    metric: Metric | None = None
    """What decides the best checkpoint and early stopping. Default eval_loss. eval_accuracy and eval_f1 (macro) for text-classification and image-classification, eval_f1 of whole entities for token-classification, eval_f1 and eval_exact_match as in SQuAD for question-answering, eval_pearson and eval_mse for problem regression, eval_rouge1, eval_rouge2 and eval_rougeL for summarization, eval_chrf and eval_bleu for translation, eval_accuracy (pairs whose better answer wins; not kto) and eval_margin (by how much) for dpo, orpo, kto and reward; eval_reward for grpo, whose default it is."""
    early_stopping: EarlyStopping | None = None
    """Stop early. Needs everySteps."""
    publish: Literal["best", "last"] | None = None
    """Which weights become the output: those of the best evaluation (default with everySteps) or the last."""
    samples: Annotated[list[Sample], Field(max_length=32)] | None = None
    """Fixed prompts to answer with the model as it is."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Longest answer to a sample, in tokens; for summarization and translation also of what is written to be measured. Default 64, for these two 128."""
    few_shot: FewShot | None = None
    """Compare the result with prompting the model as it was. For objective sft, summarization and translation."""
    generate: Literal["everyEvaluation", "beforeAndAfter"] | None = None
    """When the model writes held-out targets to be measured by ROUGE, chrF or BLEU, which takes far longer than their loss, for summarization and translation. Default beforeAndAfter: before training and of what is published; everyEvaluation where metric is one of them."""
    slices: Annotated[list[Slice], Field(min_length=1, max_length=8)] | None = None
    """Parts of the held-out rows to measure apart."""
    benchmarks: Annotated[list[Benchmark], Field(min_length=1, max_length=8)] | None = None
    """Tasks of lm-evaluation-harness to ask of the model before training, and of what would be published. For text-generation."""
    gates: Annotated[list[Gate], Field(min_length=1, max_length=16)] | None = None
    """What must hold of the weights that would be published. If one fails, nothing is published and the job has failed with cause GateFailed; its checkpoints stay."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.slices) || self.slices.all(s, self.slices.exists_one(t, t.name == s.name))",
            "each of evaluation.slices needs a name of its own",
        ),
        Rule(
            "!has(self.gates) || self.gates.all(g, !has(g.slice) || (has(self.slices) && self.slices.exists(s, s.name == g.slice)))",
            "evaluation.gates: a gate's slice must be one of evaluation.slices",
        ),
        Rule(
            "!has(self.benchmarks) || self.benchmarks.all(b, self.benchmarks.exists_one(c, c.name == b.name))",
            "each of evaluation.benchmarks needs a name of its own",
        ),
        Rule(
            "!has(self.gates) || self.gates.all(g, !has(g.benchmark) || (has(self.benchmarks) && self.benchmarks.exists(b, b.name == g.benchmark)))",
            "evaluation.gates: a gate's benchmark must be one of evaluation.benchmarks",
        ),
        Rule(
            "!has(self.earlyStopping) || has(self.everySteps)", "evaluation.earlyStopping needs evaluation.everySteps"
        ),
        Rule(
            "!(has(self.publish) && self.publish == 'best') || has(self.everySteps)",
            "evaluation.publish: best needs evaluation.everySteps",
        ),
    )


class Checkpoints(ApiModel):
    """When the state of training is saved, and where."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("everySteps", "everyMinutes", sentence="checkpoints takes everySteps or everyMinutes, not both"),
        Rule(
            "!has(self.storage) || self.storage.uri.matches('^(pvc|s3|file)://')",
            "checkpoints.storage must be pvc://claim/path or s3://bucket/prefix",
        ),
    )

    every_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Save each time this many steps are done."""
    every_minutes: Annotated[int, Field(ge=1, le=10_080)] | None = None
    """Save each time this many minutes have passed. Default 10."""
    keep: Annotated[int, Field(ge=1, le=100)] | None = None
    """Checkpoints to keep besides the best one. Default 2."""
    storage: Location | None = None
    """Where. Default: beside the output; required when that is oci:// or hf://."""
    grace_period_seconds: Annotated[int, Field(ge=30, le=86_400)] | None = None
    """Time that a stopped pod gets to save. Default 600."""


class Output(Location):
    """Where the result goes: an adapter in PEFT format, or a transformers folder. With oci:// it is an image that holds these files and that a kubelet mounts as an image volume, with hf:// a model repository (private when it is made)."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Location.rules,
        Rule(
            "self.uri.matches('^(pvc|s3)://[^/]+/.') || self.uri.matches('^oci://[^/]+/[^:@]+:[^:@]+$|^hf://[^/@]+/[^/@]+(@[^/@]+)?$') || self.uri.startsWith('file:///')",
            "output.uri must be pvc://claim/path or s3://bucket/prefix, with a path of its own, oci://registry/repository:tag or hf://org/name@branch",
        ),
    )

    merged: bool | None = None
    """Publish the whole model with the adapter merged into it, and the adapter alone in its folder adapter. For method lora, qlora (into the dequantised weights) and ia3. Default false."""


class Toleration(ApiModel):
    """A taint that the pods accept."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Taint key; empty matches all."""
    operator: Literal["Exists", "Equal"] | None = None
    """How value is compared."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; empty matches all."""
    toleration_seconds: int | None = None
    """How long a NoExecute taint is accepted."""


class Resources(ApiModel):
    """What each training pod gets, and where it may run."""

    nodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Pods that train together, one on each node. Default 1."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    """GPUs of each pod. Default 1; 0 trains on the CPU."""
    gpu_resource_name: Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9.-]+/[a-zA-Z0-9._-]+$")] | None = None
    """Extended resource that stands for a GPU. Default: the chart's trainer.gpuResourceName, which is nvidia.com/gpu."""
    cpu: Quantity | None = None
    """CPU of each pod. Default 4 a GPU, 2 without."""
    memory: Quantity | None = None
    """Memory of each pod, request and limit. Default 32Gi a GPU, 8Gi without."""
    scratch: Quantity | None = None
    """Size limit of the scratch volume: HOME, caches, downloaded model and prepared data. Default 50Gi."""
    shared_memory: Quantity | None = None
    """Size limit of /dev/shm. Default 8Gi a GPU, 1Gi without."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)] | None = None
    """Labels that a node must have."""
    affinity: Raw | None = None
    """A core/v1 Affinity."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = None
    """Taints to accept."""
    runtime_class_name: Name | None = None
    """RuntimeClass of the pods."""


class KeySelector(ApiModel):
    """One key of a Secret or ConfigMap."""

    name: Name
    """Name of the object."""
    key: Key
    """Its key."""


class EnvironmentSource(ApiModel):
    """Where a variable's value comes from."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            "secretKeyRef",
            "configMapKeyRef",
            sentence="valueFrom needs exactly one of secretKeyRef and configMapKeyRef",
        ),
    )

    secret_key_ref: KeySelector | None = None
    """A key of a Secret."""
    config_map_key_ref: KeySelector | None = None
    """A key of a ConfigMap."""


class EnvironmentVariable(ApiModel):
    """A variable for the training container."""

    rules: ClassVar[tuple[Rule, ...]] = (
        at_most_one("value", "valueFrom", sentence="an environment variable takes value or valueFrom, not both"),
        Rule(
            "!self.name.startsWith('FINETUNE_') && !self.name.startsWith('KUBEFLOW_TRAINER_SERVER_')",
            "variables that start with FINETUNE_ or KUBEFLOW_TRAINER_SERVER_ are set by the operator",
        ),
    )

    name: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")]
    """Name."""
    value: Annotated[str, Field(max_length=32_768)] | None = None
    """Value."""
    value_from: EnvironmentSource | None = None
    """A value from an object; use it for all that is secret."""


class VolumeMount(ApiModel):
    """Where a volume of runtime.volumes appears in the training container."""

    name: Annotated[str, Field(max_length=63)]
    """Name of the volume."""
    mount_path: Annotated[str, Field(max_length=1024, pattern=r"^/[^:]+$")]
    """Path in the container."""
    sub_path: Annotated[str, Field(max_length=1024)] | None = None
    """Path in the volume."""
    read_only: bool | None = None
    """Mount without write access."""


class ClaimVolume(ApiModel):
    """A PersistentVolumeClaim in the job's namespace."""

    claim_name: Name
    """Name of the claim."""
    read_only: bool | None = None
    """Mount without write access."""


class NamedVolume(ApiModel):
    """A Secret or ConfigMap in the job's namespace."""

    name: Name
    """Name of the object."""


class EmptyVolume(ApiModel):
    """An empty folder that lives as long as the pod."""

    size_limit: Quantity | None = None
    """Largest size."""


class Volume(ApiModel):
    """A volume for the training pod: exactly one source."""

    rules: ClassVar[tuple[Rule, ...]] = (
        exactly_one(
            "persistentVolumeClaim",
            "secret",
            "configMap",
            "emptyDir",
            sentence="a volume needs exactly one of persistentVolumeClaim, secret, configMap, emptyDir",
        ),
    )

    name: Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    """Name to mount it by."""
    persistent_volume_claim: ClaimVolume | None = None
    """A claim."""
    secret: NamedVolume | None = None
    """A Secret's keys as files."""
    config_map: NamedVolume | None = None
    """A ConfigMap's keys as files."""
    empty_dir: EmptyVolume | None = None
    """An empty folder."""


class Runtime(ApiModel):
    """The container that trains. Everything has a default; a command of your own takes the place of our trainer."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.command) || has(self.image)",
            "runtime.command needs runtime.image: the image that holds your program",
        ),
        Rule("!has(self.args) || has(self.command)", "runtime.args needs runtime.command"),
        Rule(
            "!has(self.volumeMounts) || (has(self.volumes) && self.volumeMounts.all(m, self.volumes.exists(v, v.name == m.name)))",
            "each of runtime.volumeMounts must name a volume of runtime.volumes",
        ),
    )

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\s]+$")] | None = None
    """Image to run instead of the operator's trainer image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled. Default as Kubernetes does: Always for the tag latest, else IfNotPresent."""
    command: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(min_length=1, max_length=64)] | None = None
    """Your own program instead of our trainer. It gets the same mounts, environment, rendezvous and progress contract."""
    args: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=256)] | None = None
    """Arguments of the command."""
    env: Annotated[list[EnvironmentVariable], Field(max_length=128)] | None = None
    """Variables for the training container."""
    service_account_name: Name | None = None
    """Service account of the pods, for cloud identity. Its own API token is never mounted. Default: the namespace's default."""
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64)] | None = None
    """Annotations of the pods."""
    image_pull_secrets: Annotated[list[SecretReference], Field(max_length=8)] | None = None
    """Secrets to pull the image with."""
    volumes: Annotated[list[Volume], Field(max_length=32)] | None = None
    """More volumes."""
    volume_mounts: Annotated[list[VolumeMount], Field(max_length=64)] | None = None
    """Where they are mounted."""
    run_as_user: Annotated[int, Field(ge=1, le=2_147_483_647)] | None = None
    """User id of the container, never root. Default 10001."""


class Cleanup(ApiModel):
    """When the children of a finished job go. The FineTuneJob itself, its record, stays."""

    after_seconds: Annotated[int, Field(ge=0, le=315_360_000)]
    """Seconds after the end until Job, pods, Service and ConfigMap are deleted."""


_SHAPE = (
    "rank",
    "alpha",
    "targets",
    "rankPattern",
    "alphaPattern",
    "modulesToSave",
    "useDora",
    "useRslora",
    "initialization",
    "experts",
)
"""What an adapter that is continued says itself."""


def _brings_its_own(method: str) -> Rule:
    fields = [
        name
        for name in _SHAPE
        if name in {field.alias for field in getattr(methods, method.title()).model_fields.values()}
    ]
    given = ", ".join(f"has(self.method.{method}.{name})" for name in fields)
    return Rule(
        f"!(has(self.model) && has(self.model.adapter) && has(self.method) && has(self.method.{method})) || [{given}].filter(x, x).size() == 0",
        f"model.adapter brings its own {', '.join(fields[:-1])} and {fields[-1]}: remove them from method.{method}",
    )


_NOTHING_HELD_OUT = "has(self.dataset) && has(self.dataset.evaluation) && has(self.dataset.evaluation.fraction) && double(self.dataset.evaluation.fraction) == 0.0"
LABEL_SMOOTHING = (*support.WRITING, "text-classification", "token-classification", "image-classification")
"""Tasks that learn classes or tokens."""
NOISE = ("text-generation", "text-classification", "token-classification", "question-answering")
"""Tasks whose rows are embedded in one piece."""
_TASK = "(has(self.task) ? self.task : 'text-generation')"


_HAS_SAMPLES = "(has(self.evaluation) && has(self.evaluation.samples) && size(self.evaluation.samples) > 0)"


def _objective_fits(name: str, tasks: tuple[str, ...]) -> Rule:
    return Rule(
        f"!(has(self.objective) && has(self.objective.{name})) || {_TASK} in {_cel_list(tasks)}",
        f"objective.{name} is for {' and '.join(tasks)}: remove it, or correct task",
    )


def _has_objective(names: tuple[str, ...]) -> str:
    chosen = " || ".join(f"has(self.objective.{name})" for name in names)
    return f"(has(self.objective) && ({chosen}))"


def _measures(metric: support.Metric) -> tuple[str, str]:
    """CEL for whether a job has a metric, and whose it is, in words."""
    fits = " || ".join(
        [f"{_TASK} in {_cel_list(metric.tasks)}"] * bool(metric.tasks)
        + [_has_objective(metric.objectives)] * bool(metric.objectives)
    )
    return fits, ", ".join([*metric.tasks, *(f"objective {objective}" for objective in metric.objectives)])


def _metric_fits(name: str, metric: support.Metric) -> Rule:
    fits, those = _measures(metric)
    return Rule(
        f"!(has(self.evaluation) && has(self.evaluation.metric) && self.evaluation.metric == '{name}') || {fits}",
        f"evaluation.metric {name} is for {those}: use eval_loss",
    )


def _gate_fits(name: str, metric: support.Metric) -> Rule:
    fits, those = _measures(metric)
    return Rule(
        f"!(has(self.evaluation) && has(self.evaluation.gates)) || !self.evaluation.gates.exists(g, g.metric == '{name}') || {fits}",
        f"evaluation.gates: metric {name} is for {those}",
    )


def _method_fits(task: support.Task) -> Rule:
    known = support.methods_of(task)
    others = [name for name in get_args(support.MethodName) if name not in known]
    chosen = " || ".join(f"has(self.method.{name})" for name in others)
    return Rule(
        f"!(has(self.task) && self.task == '{task}' && has(self.method)) || !({chosen})",
        f"task {task} is supported with method {', '.join(known)}",
    )


def _only_generates(given: str, field: str) -> Rule:
    return Rule(f"!({given}) || {_TASK} == 'text-generation'", f"{field} is for text-generation: remove it")


def _objective_method_fits(name: str, methods_: tuple[support.MethodName, ...]) -> Rule:
    others = [method for method in get_args(support.MethodName) if method not in methods_]
    chosen = " || ".join(f"has(self.method.{method})" for method in others)
    return Rule(
        f"!({_has_objective((name,))} && has(self.method)) || !({chosen})",
        f"objective.{name} is supported with method {', '.join(methods_)}",
    )


_GRPO = "has(self.objective) && has(self.objective.grpo)"
_GRPO_FITS = (
    *(_objective_method_fits(name, those) for name, those in support.OBJECTIVE_METHODS.items()),
    Rule(
        f"!({_GRPO}) || !self.objective.grpo.rewards.exists(r, has(r.entryPoint)) || (has(self.runtime) && has(self.runtime.image))",
        "objective.grpo.rewards: entryPoint is a function in an image of your own, built from the trainer's: name it in runtime.image",
    ),
    Rule(
        f"!({_GRPO} && has(self.objective.grpo.beta) && double(self.objective.grpo.beta) > 0.0) || !(has(self.model) && has(self.model.adapter)) && !(has(self.method) && (has(self.method.full) || has(self.method.freeze) || has(self.method.gradualUnfreezing) || (has(self.method.lora) && has(self.method.lora.initialization) && self.method.lora.initialization != 'zero')))",
        "objective.grpo.beta compares with the model before training, which is the one with the adapter switched off: remove it with model.adapter, method full, freeze and gradualUnfreezing, and lora.initialization pissa and olora",
    ),
    Rule(
        f"!({_GRPO} && has(self.objective.grpo.maxCompletionLength) && has(self.training) && has(self.training.sequenceLength)) || self.objective.grpo.maxCompletionLength < self.training.sequenceLength",
        "objective.grpo.maxCompletionLength leaves no token of training.sequenceLength for a prompt: lower it, or raise sequenceLength",
    ),
    Rule(
        f"!({_GRPO} && has(self.training) && has(self.training.tokensPerStep))",
        "training.tokensPerStep: how long answers will be is not known beforehand; use batchSize, in prompts, with objective grpo",
    ),
    Rule(
        f"!({_GRPO} && has(self.dataset) && has(self.dataset.format)) || self.dataset.format in ['chat', 'instruction']",
        "objective.grpo needs prompts: dataset.format chat or instruction",
    ),
    Rule(
        f"!({_GRPO} && has(self.evaluation)) || !((has(self.evaluation.metric) && self.evaluation.metric == 'eval_loss') || (has(self.evaluation.gates) && self.evaluation.gates.exists(g, g.metric == 'eval_loss')))",
        "objective.grpo has no eval_loss, since a loss of rewards says nothing about how good answers are: use eval_reward in evaluation.metric and gates",
    ),
)

_DATASET_FITS = (
    Rule(
        "!(has(self.task) && self.task == 'image-classification' && has(self.dataset)) || !(has(self.dataset.tooLong) || has(self.dataset.minTokens) || has(self.dataset.tokenBudget) || (has(self.dataset.deduplicate) && self.dataset.deduplicate == 'near'))",
        "dataset.tooLong, minTokens, tokenBudget and deduplicate: near are of text: remove them for image-classification",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.tooLong) && has(self.task) && self.task == 'question-answering')",
        "dataset.tooLong: question-answering reads a long context in windows: remove it",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.tooLong) && self.dataset.tooLong == 'split') || ((!has(self.task) || self.task == 'text-generation') && (!has(self.objective) || has(self.objective.sft) || has(self.objective.pretrain)) && (!has(self.dataset.format) || self.dataset.format == 'text'))",
        "dataset.tooLong: split is for plain text of text-generation: use truncate or drop",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.deduplicate) && self.dataset.deduplicate == 'near' && has(self.task) && self.task == 'question-answering')",
        "dataset.deduplicate: near would take questions about one context for the same: use exact",
    ),
    Rule(
        "!(has(self.dataset) && has(self.dataset.minTokens) && has(self.training) && has(self.training.sequenceLength)) || self.dataset.minTokens <= self.training.sequenceLength",
        "dataset.minTokens is more than training.sequenceLength: no row would be left",
    ),
)


_FEW_SHOT = "has(self.evaluation) && has(self.evaluation.fewShot)"
_GENERATE = "has(self.evaluation) && has(self.evaluation.generate)"
_COMPARISONS = (
    Rule(
        f"!({_FEW_SHOT}) || {_TASK} in {_cel_list(support.PAIRS)} || ({_TASK} == 'text-generation' && (!has(self.objective) || has(self.objective.sft)))",
        f"evaluation.fewShot is for objective sft, {' and '.join(support.PAIRS)}: remove it",
    ),
    Rule(
        f"!({_FEW_SHOT} && has(self.evaluation.fewShot.rows) && self.evaluation.fewShot.rows > 0) || ({_TASK} == 'text-generation' && !({_NOTHING_HELD_OUT}))",
        "evaluation.fewShot.rows are held-out rows of text-generation: remove it, or raise dataset.evaluation.fraction",
    ),
    Rule(
        f"!({_FEW_SHOT} && {_TASK} in {_cel_list(support.PAIRS)}) || {_HAS_SAMPLES}",
        f"evaluation.fewShot of {' and '.join(support.PAIRS)} is of answers to evaluation.samples: add samples or remove it",
    ),
    Rule(
        f"!({_GENERATE}) || {_TASK} in {_cel_list(support.PAIRS)}",
        f"evaluation.generate is for {' and '.join(support.PAIRS)}: remove it",
    ),
    Rule(
        f"!({_GENERATE} && self.evaluation.generate == 'beforeAndAfter') || !has(self.evaluation.metric) || !(self.evaluation.metric in {_cel_list(support.WRITTEN)})",
        "evaluation.generate: beforeAndAfter leaves evaluation.metric unmeasured on the way: use everyEvaluation, or metric eval_loss",
    ),
)


class FineTuneJobSpec(ApiModel):
    """What to train, on what, how, and where the result goes."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(has(self.runtime) && has(self.runtime.command)) || (has(self.model) && has(self.dataset) && has(self.output))",
            "spec needs model, dataset and output (only a program of your own, runtime.command, may do without)",
        ),
        Rule(
            "!(has(self.runtime) && has(self.runtime.command)) || !(has(self.task) || has(self.objective) || has(self.method) || has(self.training) || has(self.evaluation))",
            "task, objective, method, training and evaluation are read by our trainer only: remove them, or remove runtime.command",
        ),
        *(_objective_fits(name, tasks) for name, tasks in support.OBJECTIVES.items()),
        *(_metric_fits(name, metric) for name, metric in support.METRICS.items() if name != "eval_loss"),
        *(
            _method_fits(task)
            for task in get_args(support.Task)
            if support.methods_of(task) != get_args(support.MethodName)
        ),
        _only_generates(
            "has(self.training) && has(self.training.packing) && self.training.packing", "training.packing"
        ),
        Rule(
            f"!{_HAS_SAMPLES} || {_TASK} in {_cel_list(support.WRITING)}",
            f"evaluation.samples is for {', '.join(support.WRITING)}: remove it",
        ),
        *_COMPARISONS,
        Rule(
            f"!(has(self.evaluation) && has(self.evaluation.maxNewTokens)) || {_HAS_SAMPLES} || ({_TASK} in {_cel_list(support.PAIRS)})",
            "evaluation.maxNewTokens is the length of answers to evaluation.samples: add samples or remove it",
        ),
        Rule(
            f"!(has(self.dataset) && has(self.dataset.prefix)) || {_TASK} in {_cel_list(support.PAIRS)}",
            f"dataset.prefix is for {' and '.join(support.PAIRS)}: remove it",
        ),
        Rule(
            f"!(has(self.training) && has(self.training.packing) && self.training.packing) || !{_has_objective(support.UNPACKED)}",
            f"training.packing is for objective sft and pretrain: remove it (rows of {', '.join(support.UNPACKED)} are not padded either)",
        ),
        Rule(
            f"!(has(self.evaluation) && has(self.evaluation.samples) && size(self.evaluation.samples) > 0) || !{_has_objective(('reward',))}",
            "evaluation.samples need a model that writes: remove them, a reward model gives a score",
        ),
        _only_generates("has(self.evaluation) && has(self.evaluation.benchmarks)", "evaluation.benchmarks"),
        Rule(
            f"!(has(self.evaluation) && has(self.evaluation.benchmarks)) || !{_has_objective(('reward',))}",
            "evaluation.benchmarks need a model that writes: remove them, a reward model gives a score",
        ),
        Rule(
            f"!(has(self.dataset) && has(self.dataset.columns) && has(self.dataset.columns.margin)) || {_has_objective(('reward',))}",
            "dataset.columns.margin is for objective reward: remove it",
        ),
        Rule(
            "!(has(self.task) && self.task == 'image-classification' && has(self.training)) || !(has(self.training.tokensPerStep) || has(self.training.sequenceLength) || has(self.training.packing) || has(self.training.neftuneNoise))",
            "training.tokensPerStep, sequenceLength, packing and neftuneNoise are of tokens, which images have none of: remove them, and use batchSize",
        ),
        Rule(
            "!(has(self.dataset) && has(self.dataset.augmentation)) || (has(self.task) && self.task in ['image-classification', 'text-classification'])",
            "dataset.augmentation is for image-classification and text-classification: remove it",
        ),
        Rule(
            "!(has(self.task) && self.task == 'text-classification' && has(self.dataset) && has(self.dataset.augmentation)) || !(has(self.dataset.augmentation.randomResizedCrop) || has(self.dataset.augmentation.horizontalFlip) || has(self.dataset.augmentation.randAugment) || has(self.dataset.augmentation.mixup) || has(self.dataset.augmentation.cutmix))",
            "dataset.augmentation: of text-classification there are wordDropout, wordSwap and synonyms: remove the others, which are of images",
        ),
        Rule(
            "!(has(self.task) && self.task == 'image-classification' && has(self.dataset) && has(self.dataset.augmentation)) || !(has(self.dataset.augmentation.wordDropout) || has(self.dataset.augmentation.wordSwap) || has(self.dataset.augmentation.synonyms))",
            "dataset.augmentation: wordDropout, wordSwap and synonyms are of text: remove them for image-classification",
        ),
        *_DATASET_FITS,
        *_GRPO_FITS,
        Rule(
            "!(has(self.objective) && has(self.objective.classification) && has(self.objective.classification.problem) && self.objective.classification.problem != 'singleLabel') || self.task == 'text-classification'",
            "objective.classification.problem multiLabel and regression are for text-classification: remove it",
        ),
        Rule(
            f"!({_NOTHING_HELD_OUT}) || !(has(self.evaluation) && (has(self.evaluation.everySteps) || has(self.evaluation.gates) || has(self.evaluation.slices)))",
            "evaluation.everySteps, gates and slices need held-out rows, and dataset.evaluation.fraction is 0: raise it",
        ),
        Rule(
            "!(has(self.evaluation) && has(self.evaluation.gates)) || self.evaluation.gates.all(g, !has(g.set) || (has(self.dataset) && has(self.dataset.evaluation) && ((g.set == 'general' && has(self.dataset.evaluation.general)) || (has(self.dataset.evaluation.sets) && self.dataset.evaluation.sets.exists(s, s.name == g.set)))))",
            "evaluation.gates: a gate's set must be one of dataset.evaluation.sets, or general",
        ),
        *(_gate_fits(name, metric) for name, metric in support.METRICS.items() if name != "eval_loss"),
        Rule(
            f"!(has(self.dataset) && has(self.dataset.evaluation) && has(self.dataset.evaluation.general)) || ({_TASK} == 'text-generation' && !{_has_objective(support.UNPACKED)})",
            "dataset.evaluation.general is for objectives sft and pretrain: use dataset.evaluation.sets",
        ),
        Rule(
            f"!(has(self.training) && has(self.training.labelSmoothing)) || ({_TASK} in {_cel_list(LABEL_SMOOTHING)} && !{_has_objective(support.UNPACKED)})",
            f"training.labelSmoothing is for {', '.join(LABEL_SMOOTHING)}, with objectives that learn tokens or classes: remove it",
        ),
        Rule(
            f"!(has(self.training) && has(self.training.neftuneNoise)) || ({_TASK} in {_cel_list(NOISE)} && !{_has_objective(support.UNPACKED)})",
            f"training.neftuneNoise is for {', '.join(NOISE)}, not with objectives that compare or generate answers: remove it",
        ),
        Rule(
            "!(has(self.training) && has(self.training.labelSmoothing) && has(self.objective) && has(self.objective.classification) && has(self.objective.classification.problem)) || self.objective.classification.problem == 'singleLabel'",
            "training.labelSmoothing is for problem singleLabel: remove it",
        ),
        Rule(
            "!(has(self.training) && has(self.training.l2Sp)) || (has(self.method) && (has(self.method.full) || has(self.method.freeze) || has(self.method.gradualUnfreezing)))",
            "training.l2Sp pulls the model's own weights to where they began: use method full, freeze or gradualUnfreezing; an adapter's weightDecay does the same",
        ),
        Rule(
            "!(has(self.model) && has(self.model.adapter) && has(self.method)) || has(self.method.lora) || has(self.method.qlora)",
            "model.adapter continues a LoRA adapter: use method.lora or method.qlora",
        ),
        Rule(
            "!(has(self.output) && has(self.output.merged) && self.output.merged && has(self.method)) || has(self.method.lora) || has(self.method.qlora) || has(self.method.ia3)",
            "output.merged is for method lora, qlora and ia3: full, freeze and gradualUnfreezing publish a whole model anyway, and the others cannot be merged",
        ),
        Rule(
            "!(has(self.runtime) && has(self.runtime.command) && has(self.dataset)) || !(has(self.dataset.tooLong) || has(self.dataset.minTokens) || has(self.dataset.deduplicate) || has(self.dataset.tokenBudget) || has(self.dataset.augmentation) || has(self.dataset.prefix))",
            "dataset.tooLong, minTokens, deduplicate, tokenBudget, augmentation and prefix are read by our trainer only: remove them, or remove runtime.command",
        ),
        Rule(
            "!(has(self.preflight) && self.preflight == 'Required' && has(self.runtime) && has(self.runtime.command))",
            "preflight: Required checks what our trainer would do and knows nothing of a program of your own: remove it, or remove runtime.command",
        ),
        Rule(
            "!(has(self.output) && has(self.output.merged) && self.output.merged && has(self.runtime) && has(self.runtime.command))",
            "output.merged is read by our trainer only: remove it, or remove runtime.command",
        ),
        *(_brings_its_own(method) for method in ("lora", "qlora")),
        Rule(
            "!(has(self.model) && has(self.model.addTokens) && has(self.method)) || has(self.method.full) || has(self.method.gradualUnfreezing) || has(self.method.lora) || has(self.method.qlora)",
            "model.addTokens needs a method that trains rows of the embedding: full, gradualUnfreezing, lora or qlora",
        ),
        Rule(
            "!(has(self.model) && has(self.model.addTokens)) || !(has(self.runtime) && has(self.runtime.command)) && !(has(self.task) && self.task in ['summarization', 'translation', 'image-classification'])",
            "model.addTokens is for tasks text-generation, text-classification, token-classification and question-answering, by our trainer: remove it",
        ),
        Rule(
            "!(has(self.output) && self.output.uri.matches('^(oci|hf)://')) || (has(self.checkpoints) && has(self.checkpoints.storage))",
            "checkpoints.storage is required with an oci:// or hf:// output, beside which no checkpoint can lie: pvc://claim/path or s3://bucket/prefix",
        ),
        Rule(
            "!(has(self.resources) && has(self.resources.gpusPerNode) && self.resources.gpusPerNode == 0 && has(self.training) && has(self.training.optimizer) && has(self.training.optimizer.adamw) && has(self.training.optimizer.adamw.paged) && self.training.optimizer.adamw.paged)",
            "training.optimizer.adamw.paged is for GPUs, and resources.gpusPerNode is 0: remove one of the two",
        ),
        Rule(
            "!(has(self.output) && has(self.checkpoints) && has(self.checkpoints.storage)) || !(self.checkpoints.storage.uri + '/').startsWith(self.output.uri + '/')",
            "checkpoints.storage must not lie inside output.uri, which is replaced as a whole: choose a place beside it",
        ),
    )

    task: support.Task | None = None
    """What the model is for. Default text-generation."""
    model: Model | None = None
    """The model to start from."""
    dataset: Dataset | None = None
    """What to learn from."""
    objective: Objective | None = None
    """What is optimised. Default sft for text-generation, classification for text-classification, token-classification and image-classification; question-answering, summarization and translation have their own."""
    method: Method | None = None
    """Which weights are trained. Default lora."""
    training: Training | None = None
    """Hyperparameters."""
    evaluation: Evaluation | None = None
    """Evaluation, early stopping, samples."""
    checkpoints: Checkpoints | None = None
    """Saving the state of training."""
    output: Output | None = None
    """Where the result goes."""
    resources: Resources | None = None
    """What each pod gets."""
    preflight: Literal["Required", "Skip"] | None = None
    """Required: model, data, template, places and memory are checked in a pod without a GPU before GPUs are asked for, and what is wrong fails the job there, with row numbers. Default Required with GPUs and our own trainer, else Skip: the trainer checks the same first anyway."""
    suspend: bool | None = None
    """True saves a checkpoint and frees the GPUs; false continues from it."""
    retries: Annotated[int, Field(ge=0, le=100)] | None = None
    """New attempts after failures that may pass; disruptions such as a drained node are free. Default 3."""
    active_deadline_seconds: Annotated[int, Field(ge=1, le=315_360_000)] | None = None
    """Longest time from the first child to the end, suspension not counted. Then a checkpoint is saved and the job fails."""
    cleanup: Cleanup | None = None
    """Removing the children of a finished job."""
    priority_class_name: Name | None = None
    """PriorityClass of the pods."""
    runtime: Runtime | None = None
    """The container that trains."""
