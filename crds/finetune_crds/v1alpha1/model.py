"""What is trained: places, credentials, and the model with what goes onto it."""

from typing import Annotated, ClassVar, Final

from pydantic import Field

from .common import (
    ApiModel,
    Name,
    Rule,
    at_most_one,
    exactly_one,
    spelled,
)

Endpoint = Annotated[
    str, spelled(r"^https?://[^/@]+(/.*)?$", "http://HOST or https://HOST, without a user", max_length=256)
]


class SecretReference(ApiModel):
    """A Secret in the job's namespace. It is mounted into the training pod and read by nobody else."""

    name: Name
    """Name of the Secret. Keys read: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN for s3, token for hf and https, .dockerconfigjson (type kubernetes.io/dockerconfigjson) or username and password for oci."""


class Location(ApiModel):
    """A place for a model, data or results."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "self.uri.matches('^(pvc|s3|https|hf|oci|configmap|file)://[^/]')  || self.uri.startsWith('file:///')",
            "uri must be pvc://claim/path, s3://bucket/prefix, https://host/path, hf://org/name@revision, oci://registry/repository:tag, configmap://name/key or, with 'finetune local', file:///path",
        ),
        Rule(
            "!self.uri.startsWith('hf://') || self.uri.matches('^hf://[^/@]+/[^/@]')",
            "an hf:// uri needs an organisation and a name: hf://openai-community/gpt2@revision",
        ),
        Rule(
            "!self.uri.matches('^(pvc|configmap)://') || self.uri.matches('^(pvc|configmap)://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/|$)')",
            "the name of a claim or a ConfigMap has lower-case letters, digits, '-' and '.' only: pvc://claim/path, configmap://name/key",
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
    endpoint: Endpoint | None = None
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
    endpoint: Endpoint | None = None
    """Another server that speaks the same protocol, as for any location."""
    region: Annotated[str, Field(max_length=64)] | None = None
    """Region of the S3 bucket."""

    def location(self) -> Location | None:
        """The place, once it is known."""
        if isinstance(self, Location):
            return self
        given = self.model_dump(include={"uri", "secret_ref", "endpoint", "region"})
        return Location.model_validate(given) if self.uri else None


FOLDERS: Final = (
    Rule(
        "!has(self.uri) || !self.uri.startsWith('configmap://')",
        "neither a model nor an adapter fits into a ConfigMap: use pvc://, s3://, hf:// or oci://",
    ),
    Rule(
        "!has(self.uri) || !self.uri.startsWith('https://')",
        "models and adapters are folders, and https:// names one file: use hf://, s3://, oci:// or pvc://",
    ),
)
"""Where a model or an adapter lies."""


class Adapter(Reference):
    """An adapter in PEFT format."""

    rules: ClassVar[tuple[Rule, ...]] = (
        *Reference.rules,
        exactly_one("uri", "job", sentence="model.adapter needs exactly one of uri and job"),
        *FOLDERS,
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
        *FOLDERS,
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
