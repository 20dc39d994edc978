"""Manifests: the smallest, built up word by word, and those that must not pass, for two judges: `validation.check` (unit) and the API server (api)."""

from typing import Any, NamedTuple

from finetune_crds import support

Json = dict[str, Any]


def manifest(**spec: Any) -> Json:
    """The smallest useful FineTuneJob, with fields of spec replaced or, by None, removed."""
    smallest: Json = {
        "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
        "dataset": {"train": [{"uri": "pvc://datasets/support/train.jsonl"}]},
        "output": {"uri": "pvc://models/support-bot"},
    }
    fields = {key: value for key, value in {**smallest, **spec}.items() if value is not None}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "support-bot"},
        "spec": fields,
    }


class Malformed(NamedTuple):
    """What is wrong in a spec, and what is said to it."""

    spec: Json
    sentence: str
    server: str = ""
    """What the API server says, where it does not apply a rule of ours but the schema, in words of its own."""


ROWS: Json = {"train": [{"uri": "pvc://d/x"}]}
WEIGHED = {"uri": "pvc://d/y", "weight": "1"}
REGEX = {"name": "form", "regex": {"pattern": "x"}}
FUNCTION = {"name": "mine", "entryPoint": "judges.maths:right", "allowUserCode": True}

_WRONG: list[tuple[Any, ...]] = [
    ({"output": None}, "spec needs model, dataset and output"),
    ({"model": {"uri": "ftp://host/x"}}, "uri must be pvc://claim/path"),
    ({"model": {"uri": "pvc://m/../x"}}, "must not climb"),
    ({"model": {"uri": "pvc://My_Models/x"}}, "the name of a claim or a ConfigMap has lower-case letters"),
    (
        {"dataset": {"train": [{"uri": "configmap://rows-/x"}]}},
        "the name of a claim or a ConfigMap has lower-case letters",
    ),
    ({"model": {"uri": "https://u:p@host/x"}}, "credentials do not belong in a uri"),
    ({"model": {"uri": "file:///data/model"}}, "finetune local"),
    ({"model": {"uri": "pvc://m/x", "secretRef": {"name": "s"}}}, "secretRef is for"),
    ({"method": {"full": {}, "lora": {}}}, "method needs exactly one of: full, freeze, gradualUnfreezing, lora, "),
    ({"method": {}}, "method needs exactly one of: full, freeze, gradualUnfreezing, lora, "),
    ({"method": {"lora": None}}, "one without settings is written {}: method: {lora: {}}"),
    ({"objective": {"sft": None}}, "one without settings is written {}: objective: {sft: {}}"),
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
    (
        {"method": {"qlora": {"bits": 3}}},
        "spec.method.qlora.bits: Input should be 4 or 8",
        'spec.method.qlora.bits: Unsupported value: 3: supported values: "4", "8"',
    ),
    (
        {"method": {"qlora": {"initialization": "pissa"}}},
        "there is no such field",
        'unknown field "spec.method.qlora.initialization"',
    ),
    ({"method": {"qlora": {"experts": True}}}, "there is no such field", 'unknown field "spec.method.qlora.experts"'),
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
    (
        {"model": {"job": "First"}},
        "spec.model.job: must be the name of an object",
        "spec.model.job in body should match",
    ),
    ({"training": {"epochs": "1", "maxSteps": 1}}, "epochs or maxSteps, not both"),
    ({"training": {"batchSize": 1, "tokensPerStep": 1}}, "not both"),
    (
        {"training": {"learningRate": "fast"}},
        'spec.training.learningRate: must be a number from 0 upwards in quotes, such as "0.05"',
        "spec.training.learningRate in body should match",
    ),
    (
        {"training": {"learningRate": "1e999"}},
        'spec.training.learningRate: must be a number from 0 upwards in quotes, such as "0.05"',
        "spec.training.learningRate in body should match",
    ),
    (
        {"training": {"lerningRate": "1"}},
        "spec.training.lerningRate: there is no such field; did you mean learningRate?",
        'unknown field "spec.training.lerningRate"',
    ),
    ({"training": {"learning_rate": "1"}}, "did you mean learningRate?", 'unknown field "spec.training.learning_rate"'),
    (
        {"training": {"learningRate": 0.5}},
        'spec.training.learningRate: must be a string: write it in quotes, "0.5"',
        "spec.training.learningRate in body must be of type string",
    ),
    (
        {"training": {"batchSize": "4"}},
        "spec.training.batchSize: must be a number: write it without quotes, 4",
        "spec.training.batchSize in body must be of type integer",
    ),
    (
        {"dataset": {"train": [{}]}},
        "spec.dataset.train[0].uri: is required",
        "spec.dataset.train[0].uri: Required value",
    ),
    (
        {"method": {"adapters": {}}},
        "there is no such field; did you mean adapter?",
        'unknown field "spec.method.adapters"',
    ),
    (
        {"resources": {"memory": "32GB"}},
        "spec.resources.memory: '32GB' is no quantity",
        "spec.resources.memory in body should match",
    ),
    ({"resources": {"cpu": 0.5}}, "spec.resources.cpu: 0.5 is no quantity", "spec.resources.cpu"),
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
    ({"evaluation": {"gates": [{"metric": "eval_f1", "min": "1"}]}}, "judged by eval_loss, eval_perplexity:"),
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
        "jobs of summarization are judged by eval_loss, eval_rouge1, eval_rouge2, eval_rougeL:",
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
    ({"evaluation": {"metric": "eval_f1"}}, "jobs of objective sft, objective pretrain are judged by"),
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
        "jobs of objective kto are judged by eval_loss, eval_margin:",
    ),
    ({"evaluation": {"metric": "eval_margin"}}, "jobs of objective sft, objective pretrain are judged by"),
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
    # What the rows are.
    ({"dataset": ROWS | {"format": "image"}}, "rows of objective sft are of format chat or instruction or text"),
    (
        {"dataset": ROWS | {"format": "preference"}, "objective": {"sft": {}}},
        "rows of objective sft are of format chat",
    ),
    (
        {"dataset": ROWS | {"format": "chat"}, "objective": {"pretrain": {}}},
        "rows of objective pretrain are of format text",
    ),
    (
        {"dataset": ROWS | {"format": "chat"}, "objective": {"dpo": {}}},
        "objective dpo, objective orpo, objective reward are of format preference",
    ),
    (
        {"dataset": ROWS | {"format": "text"}, "objective": {"kto": {}}},
        "objective kto are of format unpairedPreference or preference",
    ),
    (
        {"dataset": ROWS | {"format": "chat"}, "task": "text-classification"},
        "rows of text-classification are of format classification",
    ),
    (
        {"dataset": ROWS | {"format": "text"}, "task": "token-classification"},
        "rows of token-classification are of format tags",
    ),
    (
        {"dataset": ROWS | {"format": "pair"}, "task": "question-answering"},
        "rows of question-answering are of format question",
    ),
    (
        {"dataset": ROWS | {"format": "instruction"}, "task": "translation"},
        "rows of summarization, translation are of format pair",
    ),
    (
        {"dataset": ROWS | {"format": "classification"}, "task": "image-classification"},
        "rows of image-classification are of format image",
    ),
    *(
        (
            {"dataset": ROWS | {"columns": {column: "x"}}, **other},
            f"only rows of format {' or '.join(support.COLUMNS[column])} have ",
        )
        for other, columns in (
            ({"objective": {"dpo": {}}}, ("messages", "input", "completion", "text", "label")),
            ({"task": "text-classification"}, ("prompt", "system", "chosen", "rejected", "margin", "image")),
            ({}, ("label", "chosen", "tokens", "tags", "question", "context", "answers", "image", "source", "target")),
        )
        for column in columns
    ),
    (
        {"dataset": ROWS | {"format": "text", "columns": {"prompt": "ask"}}},
        "only rows of format instruction or preference or unpairedPreference have prompt, system",
    ),
    (
        {"dataset": ROWS | {"format": "text"}, "objective": {"sft": {"lossOn": "assistant"}}},
        "objective.sft.lossOn: assistant needs rows in which one answers",
    ),
    (
        {"dataset": {"train": [{"uri": "pvc://d/a", "weight": "1"}, {"uri": "pvc://d/b"}]}},
        "either every source in dataset.train has a weight or none has",
    ),
    (
        {"dataset": {"train": [{"uri": "pvc://d/a", "weight": "0"}, {"uri": "pvc://d/b", "weight": "0.0"}]}},
        "dataset.train: all weights are 0",
    ),
    *(
        (
            {"dataset": ROWS | {"evaluation": evaluation}},
            "weight: there is no such field",
            f'unknown field "spec.dataset.evaluation.{path}.weight"',
        )
        for path, evaluation in (
            ("sources[0]", {"sources": [WEIGHED]}),
            ("sets[0].sources[0]", {"sets": [{"name": "a", "sources": [WEIGHED]}]}),
            ("general[0]", {"general": [WEIGHED]}),
        )
    ),
    (
        {"dataset": {"train": []}},
        "List should have at least 1 item",
        "spec.dataset.train in body should have at least 1 items",
    ),
    # What is measured.
    *(
        (
            {
                "task": "text-classification",
                "objective": {"classification": {"problem": problem}},
                "evaluation": evaluation,
            },
            f"are judged by eval_loss, {those}:",
        )
        for problem, metric, those in (
            ("regression", "eval_accuracy", "eval_pearson, eval_mse"),
            ("regression", "eval_f1", "eval_pearson, eval_mse"),
            ("multiLabel", "eval_pearson", "eval_accuracy, eval_f1"),
            ("singleLabel", "eval_mse", "eval_accuracy, eval_f1"),
        )
        for evaluation in ({"metric": metric}, {"gates": [{"metric": metric, "min": "0.5"}]})
    ),
    (
        {"task": "text-classification", "evaluation": {"metric": "eval_pearson"}},
        "jobs of text-classification of problem singleLabel, ",
    ),
    (
        {"task": "text-classification", "evaluation": {"metric": "eval_precision"}},
        "jobs of text-classification of problem singleLabel, ",
    ),
    (
        {"evaluation": {"gates": [{"metric": "eval_recall", "min": "0.5"}]}},
        "jobs of objective sft, objective pretrain are judged by",
    ),
    (
        {"objective": {"orpo": {}}, "evaluation": {"metric": "eval_perplexity"}},
        "objective reward are judged by eval_loss, eval_accuracy, eval_margin:",
    ),
    (
        {"task": "translation", "evaluation": {"gates": [{"metric": "eval_perplexity", "max": "9"}]}},
        "jobs of translation are judged by eval_loss, eval_chrf, eval_bleu:",
    ),
    (
        {"evaluation": {"metric": "eval_recal"}},
        "spec.evaluation.metric: Input should be 'eval_loss'",
        'spec.evaluation.metric: Unsupported value: "eval_recal"',
    ),
    # Numbers with which nothing would be learned.
    ({"training": {"epochs": "0.0"}}, "training.epochs must be above 0"),
    ({"training": {"labelSmoothing": "1"}}, "training.labelSmoothing must be below 1"),
    ({"training": {"dropout": "1"}}, "training.dropout must be below 1"),
    (
        {"training": {"optimizer": {"adamw": {"beta1": "1"}}}},
        "training.optimizer.adamw.beta1 and beta2 must be below 1",
    ),
    (
        {"training": {"optimizer": {"adamw": {"beta2": "1.0"}}}},
        "training.optimizer.adamw.beta1 and beta2 must be below 1",
    ),
    ({"training": {"optimizer": {"adamw": {"epsilon": "0"}}}}, "training.optimizer.adamw.epsilon must be above 0"),
    (
        {"training": {"warmupRatio": "50e-1"}},
        "spec.training.warmupRatio: must be a number from 0 to 1 in quotes",
        "spec.training.warmupRatio in body should match",
    ),
    (
        {"training": {"sequenceLength": 0}},
        "spec.training.sequenceLength: Input should be greater",
        "spec.training.sequenceLength in body should be greater than or equal to 8",
    ),
    ({"method": {"lora": {"dropout": "1"}}}, "dropout must be below 1"),
    ({"method": {"gradualUnfreezing": {"everyEpochs": "0"}}}, "method.gradualUnfreezing.everyEpochs must be above 0"),
    ({"dataset": ROWS | {"evaluation": {"fraction": "1"}}}, "dataset.evaluation.fraction must be below 1"),
    # What is not there for a task or a model.
    *(
        ({"task": task, "method": {"lora": {"experts": True}}}, "method.lora.experts is for mixtures of experts")
        for task in ("token-classification", "summarization", "image-classification")
    ),
    (
        {"task": "text-generatoin"},
        "spec.task: Input should be 'text-generation'",
        'spec.task: Unsupported value: "text-generatoin": supported values: "text-generation"',
    ),
    *(
        (
            {"task": "text-classification", "objective": {objective: {}}},
            f"objective.{objective} is for text-generation: remove it, or correct task",
        )
        for objective in ("sft", "pretrain", "orpo", "kto", "reward")
    ),
    (
        {"model": {"uri": "hf://org/name", "region": "eu-west-1"}},
        "endpoint is for s3://, hf:// and oci:// locations and region for s3:// only",
    ),
    ({"evaluation": {"publish": "best"}}, "evaluation.publish: best needs evaluation.everySteps"),
    (
        {"runtime": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}},
        "each of runtime.volumeMounts must name a volume",
    ),
    (
        {"runtime": {"runAsUser": 0}},
        "spec.runtime.runAsUser: Input should be greater",
        "spec.runtime.runAsUser in body should be greater than or equal to 1",
    ),
    ({"runtime": {"args": ["x"]}}, "runtime.args needs runtime.command"),
    (
        {"runtime": {"image": "x", "command": ["x"]}, "dataset": ROWS | {"format": "text"}},
        "prefix, format, columns, evaluation.fraction",
    ),
    (
        {"model": {"uri": "configmap://model/weights"}},
        "neither a model nor an adapter fits into a ConfigMap: use pvc://, s3://, hf:// or oci://",
    ),
    (
        {"dataset": ROWS | {"evaluation": {"fraction": "0.1", "sources": [{"uri": "pvc://d/b"}]}}},
        "dataset.evaluation takes fraction or sources, not both",
    ),
    # What lies nowhere.
    *(
        (spec, "an hf:// uri needs an organisation and a name: hf://openai-community/gpt2@revision")
        for spec in (
            *({"model": {"uri": uri}} for uri in ("hf://gpt2", "hf://org/", "hf://a@b/c", "hf://a//b")),
            {"model": {"uri": "pvc://m/x", "adapter": {"uri": "hf://adapter"}}},
            {"dataset": {"train": [{"uri": "hf://imdb"}]}},
            {"output": {"uri": "hf://org/"}},
        )
    ),
    (
        {"model": {"uri": "pvc://m/x", "adapter": {"uri": "https://h/adapter"}}},
        "models and adapters are folders, and https:// names one file",
    ),
    (
        {"model": {"uri": "pvc://m/x", "adapter": {"uri": "configmap://m/adapter"}}},
        "neither a model nor an adapter fits into a ConfigMap",
    ),
    *(
        ({"output": {"uri": uri}}, "with a path of its own without // and /./")
        for uri in ("pvc://m//", "pvc://m/.", "pvc://m//out", "s3://b/./out", "pvc://m/out//")
    ),
    (
        {"output": {"uri": "pvc://m/out/"}, "checkpoints": {"storage": {"uri": "pvc://m/out/ck"}}},
        "must not lie inside output.uri",
    ),
    (
        {"output": {"uri": "pvc://m/out"}, "checkpoints": {"storage": {"uri": "pvc://m//out/ck"}}},
        "checkpoints.storage must be pvc://claim/path or s3://bucket/prefix, without // and /./",
    ),
    # What nobody reads.
    *(
        (
            {"runtime": {"image": "x", "command": ["x"]}, "dataset": dataset},
            "evaluation.fraction, evaluation.groupBy and weight, split and config of train are read by our trainer only",
        )
        for dataset in (
            ROWS | {"evaluation": {"fraction": "0.1"}},
            ROWS | {"evaluation": {"groupBy": "customer"}},
            {"train": [WEIGHED]},
            {"train": [{"uri": "pvc://d/x", "split": "dev"}]},
            {"train": [{"uri": "pvc://d/x", "config": "main"}]},
        )
    ),
    *(
        (
            {"runtime": {"image": "x", "command": ["x"]}, "checkpoints": {name: 5}},
            "checkpoints.everySteps, everyMinutes and keep are read by our trainer only",
        )
        for name in ("everySteps", "everyMinutes", "keep")
    ),
    *(
        (
            {
                "runtime": {"image": "x", "command": ["x"]},
                "output": {"uri": uri},
                "checkpoints": {"storage": {"uri": "pvc://c/x"}},
            },
            "with runtime.command your program writes the result itself",
        )
        for uri in ("oci://registry/bot:v1", "hf://org/name")
    ),
    # What cannot come about.
    ({"training": {"learningRate": "0e0"}}, "training.learningRate must be above 0"),
    ({"training": {"warmupSteps": 51, "maxSteps": 50}}, "training.warmupSteps is more than maxSteps"),
    (
        {"objective": {"kto": {"desirableWeight": "0", "undesirableWeight": "0.0"}}},
        "objective.kto: both weights are 0, so nothing would be learned: raise one",
    ),
    ({"evaluation": {"gates": [{"metric": "eval_loss", "min": "2", "max": "1"}]}}, "has a min above its max"),
    *(
        (
            {"resources": {name: quantity}},
            f"spec.resources.{name}: {quantity!r} is no quantity above 0",
            f"spec.resources.{name} in body should {'match' if isinstance(quantity, str) else 'be greater than or equal to 1'}",
        )
        for name, quantity in (
            ("memory", 0),
            ("memory", "-4Gi"),
            ("cpu", "0m"),
            ("scratch", "0.0Gi"),
            ("sharedMemory", -1),
        )
    ),
]
_WRONG_GRPO: list[tuple[Any, ...]] = [
        ({"rewards": []}, {}, "spec.objective.grpo.rewards: List should have at least 1 item", "spec.objective.grpo.rewards in body should have at least 1 items"),
        ({"rewards": [{"name": "none"}]}, {}, "needs exactly one of: regex, jsonSchema, reference, model, entryPoint"),
        ({"rewards": [REGEX | {"reference": {"column": "a"}}]}, {}, "needs exactly one of: regex"),
        ({"rewards": [REGEX, REGEX]}, {}, "needs a name of its own"),
        ({"rewards": [FUNCTION | {"allowUserCode": False}]}, {"runtime": {"image": "mine"}}, "needs allowUserCode: true"),
        ({"rewards": [REGEX | {"allowUserCode": True}]}, {}, "and nothing else does"),
        ({"rewards": [FUNCTION]}, {}, "name it in runtime.image"),
        ({"rewards": [FUNCTION | {"entryPoint": "os"}]}, {"runtime": {"image": "mine"}}, "entryPoint: must be package.module:function", "spec.objective.grpo.rewards[0].entryPoint in body should match"),
        ({"rewards": [{"name": "m", "model": {"uri": "ftp://x/y"}}]}, {}, "uri must be pvc://"),
        ({"rewards": [{"name": "m", "model": {"uri": "pvc://m/x", "job": "liked"}}]}, {}, "exactly one of model.uri and model.job"),
        ({"rewards": [{"name": "m", "model": {"adapter": {"job": "liked"}}}]}, {}, "exactly one of model.uri and model.job"),
        ({"rewards": [{"name": "m", "model": {"job": "liked", "region": "eu"}}]}, {}, "remove them beside job"),
        ({"rewards": [{"name": "m", "model": {"uri": "configmap://m/x"}}]}, {}, "fits into a ConfigMap"),
        ({"rewards": [{"name": "m", "model": {"uri": "pvc://m/x", "adapter": {}}}]}, {}, "model.adapter needs exactly one of uri and job"),
        ({"temperature": "0"}, {}, "temperature must be above 0"),
        ({"epsilon": "0.2", "epsilonHigh": "0.1"}, {}, "epsilonHigh is the upper bound"),
        ({"generations": 1}, {}, "spec.objective.grpo.generations: Input should be greater", "spec.objective.grpo.generations in body should be greater"),
        ({}, {"method": {"prefix": {}}}, "objective.grpo is supported with method full, freeze"),
        ({"beta": "0.1"}, {"method": {"full": {}}}, "compares with the model before training"),
        ({"beta": "0.1"}, {"method": {"lora": {"initialization": "pissa"}}}, "compares with the model before training"),
        ({"beta": "0.1"}, {"model": {"uri": "pvc://m/x", "adapter": {"uri": "pvc://m/a"}}}, "compares with the model"),
        ({"maxCompletionLength": 64}, {"training": {"sequenceLength": 64}}, "leaves no token of training.sequenceLength"),
        ({}, {"training": {"tokensPerStep": 4096}}, "use batchSize, in prompts"),
        ({}, {"training": {"packing": True}}, "training.packing is for objective sft and pretrain"),
        ({}, {"training": {"labelSmoothing": "0.1"}}, "labelSmoothing is for"),
        ({}, {"training": {"neftuneNoise": "5"}}, "not with objective dpo, orpo, kto, reward, grpo: remove it"),
        ({}, {"dataset": {"train": [{"uri": "pvc://d/t"}], "format": "text"}}, "rows of objective grpo are of format chat or instruction"),
        ({}, {"dataset": {"train": [{"uri": "pvc://d/t"}], "evaluation": {"general": [{"uri": "pvc://d/g"}]}}}, "general is for"),
        ({}, {"evaluation": {"metric": "eval_loss"}}, "jobs of objective grpo are judged by eval_reward:"),
        ({}, {"evaluation": {"gates": [{"metric": "eval_loss", "max": "1"}]}}, "jobs of objective grpo are judged by eval_reward:"),
        ({}, {"task": "text-classification"}, "objective.grpo is for text-generation"),
        ({}, {"dataset": ROWS | {"columns": {"completion": "a"}}}, "or name it as objective.grpo.rewards[].reference.column"),
        ({"rewards": [REGEX | {"weight": "-0.0"}]}, {}, "objective.grpo.rewards: all weights are 0"),
        ({"rewards": [REGEX | {"weight": "0"}, REGEX | {"name": "too", "weight": "0e3"}]}, {}, "all weights are 0"),
]  # fmt: skip
MALFORMED = [
    *(Malformed(*wrong) for wrong in _WRONG),
    *(
        Malformed({"objective": {"grpo": {"rewards": [REGEX]} | grpo}, **spec}, *said)
        for grpo, spec, *said in _WRONG_GRPO
    ),
]
NAMES = [f"{i} {wrong.sentence[:60]}" for i, wrong in enumerate(MALFORMED)]
