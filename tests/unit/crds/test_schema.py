"""The CRD: structural, described, small; the same rules hold without an API server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_crds.generate import files
from finetune_crds.schema import crd, openapi
from finetune_crds.validation import InvalidJob, check

from .builders import manifest

CLIENT_SIDE_APPLY_MAX = 200 * 1024
"""Bytes; `kubectl apply` keeps a copy, as JSON, in annotations of at most 256 KiB."""


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[]")


def test_every_field_has_a_description() -> None:
    missing = [
        p
        for p, n in nodes(openapi())
        if p.split(".")[-1] not in ("", "metadata") and not p.endswith("[]") and not n.get("description")
    ]
    assert missing == []


def test_the_schema_is_structural() -> None:
    for path, node in nodes(openapi()):
        assert not {"$ref", "allOf", "oneOf", "default", "title"} & node.keys(), path
        assert node.get("type") or node.get("x-kubernetes-int-or-string") or path == "", path
        assert node.get("type") != "number", f"{path}: floats do not survive every client"


def test_the_crd_fits_into_a_client_side_apply() -> None:
    copy = json.dumps(crd(), separators=(",", ":"), ensure_ascii=False)
    escaped = sum(copy.count(letter) for letter in "&<>")  # of which Go writes six bytes each
    assert len(copy.encode()) + 5 * escaped < CLIENT_SIDE_APPLY_MAX


def test_helm_sees_no_braces_of_its_own_in_the_crd() -> None:
    (template,) = (text for path, text in files().items() if path.name == "crds.yaml")
    assert template.replace('{{ "{{" }}', "").count("{{") == 2, "only the condition around the CRD is Helm's"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"output": None}, "spec needs model, dataset and output"),
        ({"model": {"uri": "ftp://host/x"}}, "uri must be pvc://claim/path"),
        ({"model": {"uri": "pvc://m/../x"}}, "must not climb"),
        ({"model": {"uri": "https://u:p@host/x"}}, "credentials do not belong in a uri"),
        ({"model": {"uri": "file:///data/model"}}, "finetune local"),
        ({"model": {"uri": "pvc://m/x", "secretRef": {"name": "s"}}}, "secretRef is for"),
        ({"method": {"full": {}, "lora": {}}}, "method needs exactly one of: full, freeze, gradualUnfreezing, lora, "),
        ({"method": {}}, "method needs exactly one of: full, freeze, gradualUnfreezing, lora, "),
        ({"method": {"full": {"layerDecay": "0.0"}}}, "method.full.layerDecay must be above 0"),
        ({"method": {"qlora": {"loraPlusRatio": "0"}}}, "loraPlusRatio must be above 0"),
        ({"method": {"freeze": {}}}, "method.freeze needs what is trained: trainLastBlocks, trainModules"),
        ({"method": {"freeze": {"trainHead": False}}}, "method.freeze needs what is trained"),
        ({"method": {"gradualUnfreezing": {}}}, "needs exactly one of everySteps and everyEpochs"),
        ({"method": {"gradualUnfreezing": {"everySteps": 1, "layerDecay": "0"}}}, "layerDecay must be above 0"),
        ({"method": {"qlora": {"bits": 8, "doubleQuantization": True}}}, "doubleQuantization is of 4 bits"),
        (
            {"training": {"optimizer": {"adamw": {"paged": True}}}, "resources": {"gpusPerNode": 0}},
            "training.optimizer.adamw.paged is for GPUs",
        ),
        ({"method": {"qlora": {"bits": 3}}}, "spec.method.qlora.bits: Input should be 4 or 8"),
        ({"method": {"qlora": {"initialization": "pissa"}}}, "there is no such field"),
        ({"method": {"qlora": {"experts": True}}}, "there is no such field"),
        ({"method": {"lora": {"experts": True, "dropout": "0.1"}}}, "method.lora.experts adapts weights that have no"),
        ({"method": {"lora": {"experts": True, "initialization": "pissa"}}}, "method.lora.experts adapts weights that"),
        ({"method": {"prefix": {"projectionSize": 8}}}, "set projection to true, or remove it"),
        ({"method": {"prefix": {"projection": True, "initialText": "x"}}}, "remove one of the two"),
        (
            {"method": {"ia3": {}}, "model": {"uri": "pvc://m/x", "adapter": {"uri": "pvc://m/a"}}},
            "model.adapter continues a LoRA adapter: use method.lora or method.qlora",
        ),
        (
            {"method": {"qlora": {"rank": 4}}, "model": {"uri": "pvc://m/x", "adapter": {"uri": "pvc://m/a"}}},
            "model.adapter brings its own rank, alpha, targets, rankPattern, alphaPattern, modulesToSave, useDora and useRslora: remove them from method.qlora",
        ),
        ({"model": {"uri": "pvc://m/x", "addTokens": {}}}, "model.addTokens needs exactly one of tokens and file"),
        (
            {"model": {"uri": "pvc://m/x", "addTokens": {"tokens": ["a"]}, "adapter": {"uri": "pvc://m/a"}}},
            "model.adapter was trained without the tokens of model.addTokens",
        ),
        (
            {"model": {"uri": "pvc://m/x", "addTokens": {"file": {"uri": "oci://r/x:y"}}}},
            "an image holds no list of tokens",
        ),
        (
            {"model": {"uri": "pvc://m/x", "addTokens": {"tokens": ["a"]}}, "method": {"ia3": {}}},
            "model.addTokens needs a method that trains rows of the embedding",
        ),
        (
            {"model": {"uri": "pvc://m/x", "addTokens": {"tokens": ["a"]}}, "task": "summarization"},
            "model.addTokens is for tasks text-generation, text-classification",
        ),
        ({"model": {}}, "model needs exactly one of uri and job"),
        ({"model": {"uri": "pvc://m/x", "job": "first"}}, "model needs exactly one of uri and job"),
        (
            {"model": {"uri": "pvc://m/x", "adapter": {"secretRef": {"name": "s"}}}},
            "model.adapter needs exactly one of",
        ),
        ({"model": {"uri": "pvc://m/x", "adapter": {"uri": "ftp://x/y"}}}, "uri must be pvc://claim/path"),
        ({"model": {"uri": "pvc://m/x", "adapter": {"uri": "file:///a"}}}, "works with 'finetune local' only"),
        ({"model": {"job": "first", "endpoint": "http://m:9000"}}, "endpoint and region of a job's output are known"),
        ({"model": {"job": "First"}}, "spec.model.job"),
        ({"training": {"epochs": "1", "maxSteps": 1}}, "epochs or maxSteps, not both"),
        ({"training": {"batchSize": 1, "tokensPerStep": 1}}, "not both"),
        ({"training": {"learningRate": "fast"}}, "learningRate"),
        (
            {"training": {"lerningRate": "1"}},
            "spec.training.lerningRate: there is no such field; did you mean learningRate?",
        ),
        ({"training": {"learning_rate": "1"}}, "did you mean learningRate?"),
        (
            {"training": {"learningRate": 0.5}},
            'spec.training.learningRate: must be a string: write it in quotes, "0.5"',
        ),
        ({"training": {"batchSize": "4"}}, "spec.training.batchSize: Input should be a valid integer"),
        ({"dataset": {"train": [{}]}}, "spec.dataset.train[0].uri: is required"),
        ({"method": {"adapters": {}}}, "there is no such field; did you mean adapter?"),
        ({"resources": {"memory": "32GB"}}, "spec.resources.memory: '32GB' is no quantity"),
        ({"resources": {"cpu": 0.5}}, "spec.resources.cpu: 0.5 is no quantity"),
        ({"evaluation": {"earlyStopping": {"patience": 1}}}, "earlyStopping needs evaluation.everySteps"),
        ({"evaluation": {"maxNewTokens": 5}}, "add prompts or remove it"),
        (
            {"objective": {"dpo": {}}, "evaluation": {"fewShot": {}}},
            "evaluation.fewShot is for objective sft, summarization and translation",
        ),
        (
            {"task": "translation", "evaluation": {"fewShot": {"rows": 5}, "prompts": ["x"]}},
            "evaluation.fewShot.rows are held-out rows of text-generation",
        ),
        ({"task": "translation", "evaluation": {"fewShot": {"examples": 2}}}, "is of answers to evaluation.prompts"),
        (
            {
                "evaluation": {"fewShot": {"rows": 5}},
                "dataset": {"train": [{"uri": "pvc://d/x.jsonl"}], "evaluation": {"fraction": "0"}},
            },
            "or raise dataset.evaluation.fraction",
        ),
        ({"evaluation": {"generate": "everyEvaluation"}}, "evaluation.generate is for summarization and translation"),
        (
            {"task": "translation", "evaluation": {"generate": "beforeAndAfter", "metric": "eval_chrf"}},
            "leaves evaluation.metric unmeasured on the way",
        ),
        (
            {
                "evaluation": {"everySteps": 5},
                "dataset": {"train": [{"uri": "pvc://d/x.jsonl"}], "evaluation": {"fraction": "0.0"}},
            },
            "everySteps, gates and slices need held-out rows",
        ),
        ({"evaluation": {"gates": [{"metric": "eval_loss"}]}}, "needs min, max or maxRegression"),
        (
            {"evaluation": {"gates": [{"metric": "eval_loss", "max": "1", "slice": "eu"}]}},
            "must be one of evaluation.slices",
        ),
        (
            {"evaluation": {"gates": [{"metric": "eval_loss", "max": "1", "set": "law"}]}},
            "must be one of dataset.evaluation.sets",
        ),
        ({"evaluation": {"gates": [{"metric": "eval_f1", "min": "1"}]}}, "metric eval_f1 is for text-classification"),
        (
            {"task": "question-answering", "dataset": {"train": [{"uri": "pvc://d/x"}], "tooLong": "drop"}},
            "reads a long context in windows",
        ),
        (
            {"task": "question-answering", "dataset": {"train": [{"uri": "pvc://d/x"}], "deduplicate": "near"}},
            "use exact",
        ),
        (
            {"dataset": {"train": [{"uri": "pvc://d/x"}], "tooLong": "split", "format": "chat"}},
            "split is for plain text of text-generation",
        ),
        (
            {"task": "text-classification", "dataset": {"train": [{"uri": "pvc://d/x"}], "tooLong": "split"}},
            "split is for plain text of text-generation",
        ),
        (
            {"dataset": {"train": [{"uri": "pvc://d/x"}], "minTokens": 65}, "training": {"sequenceLength": 64}},
            "no row would be left",
        ),
        (
            {
                "dataset": {
                    "train": [{"uri": "pvc://d/x"}],
                    "evaluation": {"fraction": "0", "general": [{"uri": "pvc://d/y"}]},
                }
            },
            "measured beside held-out rows",
        ),
        ({"training": {"l2Sp": "0.1"}}, "use method full, freeze or gradualUnfreezing"),
        ({"task": "question-answering", "training": {"labelSmoothing": "0.1"}}, "training.labelSmoothing is for"),
        (
            {"task": "question-answering", "method": {"prompt": {}}},
            "task question-answering is supported with method full",
        ),
        ({"objective": {"classification": {}}}, "objective.classification is for text-classification"),
        ({"task": "translation", "training": {"neftuneNoise": "5"}}, "training.neftuneNoise is for"),
        (
            {"task": "summarization", "evaluation": {"metric": "eval_bleu"}},
            "eval_bleu is for translation: use eval_loss",
        ),
        ({"task": "translation", "method": {"prompt": {}}}, "task translation is supported with method full, freeze, "),
        ({"task": "translation", "training": {"packing": True}}, "training.packing is for text-generation"),
        (
            {"task": "text-classification", "evaluation": {"prompts": ["x"]}},
            "evaluation.prompts is for text-generation, summarization, translation",
        ),
        (
            {"dataset": {"train": [{"uri": "pvc://d/x.jsonl"}], "prefix": "summarize: "}},
            "dataset.prefix is for summarization and translation: remove it",
        ),
        ({"evaluation": {"metric": "eval_f1"}}, "eval_f1 is for text-classification"),
        (
            {"objective": {"dpo": {}, "sft": {}}},
            "objective needs exactly one of: sft, pretrain, dpo, orpo, kto, reward",
        ),
        ({"objective": {"dpo": {}}, "task": "text-classification"}, "objective.dpo is for text-generation"),
        ({"objective": {"dpo": {"beta": "0"}}}, "objective.dpo.beta must be above 0"),
        ({"objective": {"kto": {"beta": "0.0"}}}, "objective.kto.beta must be above 0"),
        ({"objective": {"dpo": {"labelSmoothing": "0.5"}}}, "wrong way round: below 0.5"),
        ({"objective": {"dpo": {"labelSmoothing": "0.1", "loss": "ipo"}}}, "labelSmoothing is for loss sigmoid"),
        ({"objective": {"orpo": {}}, "training": {"packing": True}}, "packing is for objective sft and pretrain"),
        ({"objective": {"reward": {}}, "evaluation": {"prompts": ["x"]}}, "a reward model gives a score"),
        (
            {"objective": {"kto": {}}, "evaluation": {"metric": "eval_accuracy"}},
            "image-classification, objective dpo, objective orpo",
        ),
        ({"evaluation": {"metric": "eval_margin"}}, "eval_margin is for objective dpo, objective orpo, objective kto"),
        (
            {"objective": {"dpo": {}}, "dataset": {"train": [{"uri": "pvc://d/t"}], "columns": {"margin": "m"}}},
            "dataset.columns.margin is for objective reward",
        ),
        (
            {"task": "image-classification", "training": {"tokensPerStep": 512}},
            "training.tokensPerStep, sequenceLength, packing and neftuneNoise are of tokens",
        ),
        (
            {"task": "image-classification", "training": {"sequenceLength": 512}},
            "training.tokensPerStep, sequenceLength, packing and neftuneNoise are of tokens",
        ),
        (
            {"task": "image-classification", "method": {"prompt": {}}},
            "task image-classification is supported with method full, freeze, gradualUnfreezing, lora, adapter, ia3",
        ),
        (
            {"task": "image-classification", "objective": {"classification": {"problem": "multiLabel"}}},
            "multiLabel and regression are for text-classification",
        ),
        (
            {"dataset": {"train": [{"uri": "pvc://d/x"}], "augmentation": {"horizontalFlip": "0.5"}}},
            "dataset.augmentation is for image-classification and text-classification",
        ),
        (
            {
                "task": "image-classification",
                "dataset": {"train": [{"uri": "pvc://d/x"}], "augmentation": {"wordSwap": "0.1"}},
            },
            "wordDropout, wordSwap and synonyms are of text",
        ),
        (
            {
                "task": "text-classification",
                "dataset": {"train": [{"uri": "pvc://d/x"}], "augmentation": {"mixup": "0.2"}},
            },
            "remove the others, which are of images",
        ),
        (
            {
                "task": "text-classification",
                "dataset": {"train": [{"uri": "pvc://d/x"}], "augmentation": {"wordDropout": "1"}},
            },
            "wordDropout must be above 0 and below 1",
        ),
        (
            {
                "task": "token-classification",
                "dataset": {"train": [{"uri": "pvc://d/x"}], "augmentation": {"wordDropout": "0.1"}},
            },
            "dataset.augmentation is for image-classification and text-classification",
        ),
        (
            {
                "task": "text-classification",
                "dataset": {
                    "train": [{"uri": "pvc://d/x"}],
                    "augmentation": {"synonyms": {"uri": "oci://registry/words:v1"}},
                },
            },
            "an image holds no list of synonyms",
        ),
        (
            {
                "task": "image-classification",
                "dataset": {"train": [{"uri": "pvc://d/x"}], "augmentation": {"mixup": "1", "cutmix": "1"}},
            },
            "mixup or cutmix, not both",
        ),
        (
            {
                "task": "image-classification",
                "dataset": {"train": [{"uri": "pvc://d/x"}], "augmentation": {"mixup": "0"}},
            },
            "must be above 0",
        ),
        (
            {
                "task": "text-classification",
                "evaluation": {"benchmarks": [{"name": "a", "uri": "pvc://d/a"}]},
            },
            "evaluation.benchmarks is for text-generation",
        ),
        (
            {"objective": {"reward": {}}, "evaluation": {"benchmarks": [{"name": "a", "uri": "pvc://d/a"}]}},
            "evaluation.benchmarks need a model that writes",
        ),
        ({"evaluation": {"benchmarks": [{"name": "a", "uri": "hf://o/n"}]}}, "a task is a folder of files"),
        (
            {"evaluation": {"benchmarks": [{"name": "a", "uri": "pvc://d/a"}, {"name": "a", "uri": "pvc://d/b"}]}},
            "each of evaluation.benchmarks needs a name of its own",
        ),
        (
            {"evaluation": {"gates": [{"metric": "acc", "benchmark": "a", "min": "0.5"}]}},
            "a gate's benchmark must be one of evaluation.benchmarks",
        ),
        ({"evaluation": {"gates": [{"metric": "acc", "min": "0.5"}]}}, "or with benchmark a metric of its task"),
        (
            {"evaluation": {"gates": [{"metric": "eval_loss", "benchmark": "a", "set": "b", "max": "1"}]}},
            "names a set, a slice or a benchmark, only one of them",
        ),
        ({"runtime": {"command": ["x"]}}, "runtime.command needs runtime.image"),
        (
            {"runtime": {"image": "x", "command": ["x"]}, "preflight": "Required"},
            "knows nothing of a program of your own",
        ),
        ({"runtime": {"image": "x", "command": ["x"]}, "training": {}}, "are read by our trainer only"),
        ({"runtime": {"env": [{"name": "FINETUNE_ATTEMPT", "value": "7"}]}}, "are set by the operator"),
        ({"output": {"uri": "pvc://models"}}, "with a path of its own"),
        ({"output": {"uri": "pvc://m/x", "merged": True}, "method": {"full": {}}}, "output.merged is for method lora"),
        ({"output": {"uri": "oci://registry/bot"}}, "oci://registry/repository:tag"),
        ({"output": {"uri": "hf://org/name/folder"}}, "or hf://org/name@branch"),
        ({"output": {"uri": "hf://org/name"}}, "checkpoints.storage is required with an oci:// or hf:// output"),
        ({"output": {"uri": "oci://registry/Bot:v1"}}, "with a repository of lower-case letters"),
        (
            {"output": {"uri": "oci://registry:5000/bot:v1"}},
            "checkpoints.storage is required with an oci:// or hf:// output",
        ),
        ({"dataset": {"train": [{"uri": "oci://registry/rows:v1"}]}}, "an image holds no training rows"),
        (
            {"dataset": {"train": [{"uri": "hf://o/n/*.csv", "split": "dev"}]}},
            "split and config choose among the files of a folder",
        ),
        (
            {"dataset": {"train": [{"uri": "https://h/a.csv", "config": "x"}]}},
            "split and config choose among the files of a folder",
        ),
        ({"checkpoints": {"storage": {"uri": "hf://a/b"}}}, "checkpoints.storage must be"),
        ({"checkpoints": {"storage": {"uri": "pvc://models/support-bot/saved"}}}, "must not lie inside output.uri"),
    ],
)
def test_a_malformed_manifest_is_told_what_to_mend(spec: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        check(manifest(**spec), cluster=True)
    assert sentence in str(refused.value)


def test_an_image_takes_the_output_where_checkpoints_lie_elsewhere() -> None:
    to_image = {"uri": "oci://registry:5000/team/bot:v1", "secretRef": {"name": "push"}, "endpoint": "http://r:5000"}
    spec = check(manifest(output=to_image, checkpoints={"storage": {"uri": "pvc://work/bot"}}), cluster=True).spec
    assert spec.output is not None


def test_file_locations_are_for_local_runs() -> None:
    assert check(manifest(model={"uri": "file:///data/model"}), cluster=False).spec.model is not None


REGEX = {"name": "form", "regex": {"pattern": "x"}}
FUNCTION = {"name": "mine", "entryPoint": "judges.maths:right", "allowUserCode": True}


@pytest.mark.parametrize(
    ("grpo", "spec", "sentence"),
    [
        ({"rewards": []}, {}, "spec.objective.grpo.rewards"),
        ({"rewards": [{"name": "none"}]}, {}, "needs exactly one of: regex, jsonSchema, reference, model, entryPoint"),
        ({"rewards": [REGEX | {"reference": {"column": "a"}}]}, {}, "needs exactly one of: regex"),
        ({"rewards": [REGEX, REGEX]}, {}, "needs a name of its own"),
        ({"rewards": [FUNCTION | {"allowUserCode": False}]}, {"runtime": {"image": "mine"}}, "needs allowUserCode: true"),
        ({"rewards": [REGEX | {"allowUserCode": True}]}, {}, "and nothing else does"),
        ({"rewards": [FUNCTION]}, {}, "name it in runtime.image"),
        ({"rewards": [FUNCTION | {"entryPoint": "os"}]}, {}, "entryPoint"),
        ({"rewards": [{"name": "m", "model": {"uri": "ftp://x/y"}}]}, {}, "uri must be pvc://"),
        ({"rewards": [{"name": "m", "model": {"uri": "pvc://m/x", "job": "liked"}}]}, {}, "exactly one of model.uri and model.job"),
        ({"rewards": [{"name": "m", "model": {"adapter": {"job": "liked"}}}]}, {}, "exactly one of model.uri and model.job"),
        ({"rewards": [{"name": "m", "model": {"job": "liked", "region": "eu"}}]}, {}, "remove them beside job"),
        ({"rewards": [{"name": "m", "model": {"uri": "configmap://m/x"}}]}, {}, "does not fit into a ConfigMap"),
        ({"rewards": [{"name": "m", "model": {"uri": "pvc://m/x", "adapter": {}}}]}, {}, "model.adapter needs exactly one of uri and job"),
        ({"temperature": "0"}, {}, "temperature must be above 0"),
        ({"epsilon": "0.2", "epsilonHigh": "0.1"}, {}, "epsilonHigh is the upper bound"),
        ({"generations": 1}, {}, "generations"),
        ({}, {"method": {"prefix": {}}}, "objective.grpo is supported with method full, freeze"),
        ({"beta": "0.1"}, {"method": {"full": {}}}, "compares with the model before training"),
        ({"beta": "0.1"}, {"method": {"lora": {"initialization": "pissa"}}}, "compares with the model before training"),
        ({"beta": "0.1"}, {"model": {"uri": "pvc://m/x", "adapter": {"uri": "pvc://m/a"}}}, "compares with the model"),
        ({"maxCompletionLength": 64}, {"training": {"sequenceLength": 64}}, "leaves no token of training.sequenceLength"),
        ({}, {"training": {"tokensPerStep": 4096}}, "use batchSize, in prompts"),
        ({}, {"training": {"packing": True}}, "training.packing is for objective sft and pretrain"),
        ({}, {"training": {"labelSmoothing": "0.1"}}, "labelSmoothing is for"),
        ({}, {"training": {"neftuneNoise": "5"}}, "or generate answers"),
        ({}, {"dataset": {"train": [{"uri": "pvc://d/t"}], "format": "text"}}, "objective.grpo needs prompts"),
        ({}, {"dataset": {"train": [{"uri": "pvc://d/t"}], "evaluation": {"general": [{"uri": "pvc://d/g"}]}}}, "general is for"),
        ({}, {"evaluation": {"metric": "eval_loss"}}, "objective.grpo has no eval_loss"),
        ({}, {"evaluation": {"gates": [{"metric": "eval_loss", "max": "1"}]}}, "objective.grpo has no eval_loss"),
        ({}, {"task": "text-classification"}, "objective.grpo is for text-generation"),
    ],
)  # fmt: skip
def test_what_grpo_cannot_do_is_refused(grpo: dict[str, Any], spec: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        check(manifest(objective={"grpo": {"rewards": [REGEX]} | grpo}, **spec), cluster=True)
    assert sentence in str(refused.value)


def test_what_grpo_can_do_is_not() -> None:
    rewards = [
        REGEX,
        FUNCTION,
        {"name": "schema", "weight": "-1", "jsonSchema": {"schema": '{"type": "object"}'}},
        {"name": "judge", "model": {"uri": "pvc://m/base", "adapter": {"uri": "pvc://m/reward"}}},
    ]  # fmt: skip
    grpo = {"rewards": rewards, "beta": "0.04", "epsilonHigh": "0.28"}
    check(manifest(objective={"grpo": grpo}, runtime={"image": "mine"}, method={"qlora": {}}), cluster=True)
    with pytest.raises(InvalidJob, match="eval_reward is for objective grpo"):
        check(manifest(evaluation={"metric": "eval_reward"}), cluster=True)
