"""Benchmarks, run: lm-evaluation-harness asks and scores, our model in memory answers, adapters inside. Called by train.

Every rank builds the same requests, answers its share of them, and gets all answers, so all ranks come to the same metrics. Nothing is
downloaded: tasks and data are files (see files), and the libraries are told to stay offline before they are imported. The harness
takes seconds to import, so a job without benchmarks never does.
"""

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import Flat
from ..data.templates import rendered
from ..errors import UserError
from ..modelling import anatomy, samples
from ..modelling.head_loss import CHUNK_BYTES
from ..modelling.models import Model, inference
from ..ranks import Ranks
from ..results.state import Metrics
from .files import TaskFile

FEW_SHOT_SEED: Final = 1234
"""The harness's own."""
MOST_NEW_TOKENS: Final = 256
"""Of an answer whose task does not say, as in the harness."""
_WRONG: Final = (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, OSError, ImportError)

Scored = tuple[float, bool]
"""Log-probability of a continuation, and whether it is the most likely one."""


class _Stopped(Exception):
    """Some rank was asked to stop."""


class Benchmarks:
    """What a job is measured by besides its own rows."""

    def __init__(self, tasks: Sequence[TaskFile], tokenizer: Any, tokens: int, ranks: Ranks) -> None:
        """Args: tasks: to be run; tokenizer: the model's; tokens: in one forward pass, about; ranks: who shares the work."""
        self._tasks, self._tokenizer, self._tokens, self._ranks = tasks, tokenizer, tokens, ranks

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def __call__(self, model: Model, scratch: Path, stopping: Callable[[], bool]) -> Metrics | None:
        """Metrics of a model, as benchmark/NAME/METRIC.

        Args:
            model: put into evaluation mode meanwhile.
            scratch: folder for the data as the harness reads it.
            stopping: whether this rank was asked to stop; asked between forward passes.

        Returns:
            Metrics, or None if any rank was asked to stop before it was through.

        Raises:
            UserError: the harness cannot load or run a task.
        """
        found: Metrics = {}
        cache = scratch / "benchmarks-cache" / str(self._ranks.rank)
        try:
            with inference(model):
                for task in self._tasks:
                    found |= self._measured(task, model, cache, stopping)
        except _Stopped:
            return None
        return found

    def _measured(self, task: TaskFile, model: Model, cache: Path, stopping: Callable[[], bool]) -> Metrics:
        _stay_offline(cache)
        from lm_eval.evaluator import evaluate

        benchmark = task.benchmark
        with _templates(sandboxed=not benchmark.allow_user_code):
            with _told(task, "load"):
                loaded = _loaded(task, cache)
            with _told(task, "run"):
                results = evaluate(
                    _answering(model, self._tokenizer, self._tokens, self._ranks, stopping),
                    loaded,
                    limit=benchmark.limit,
                    bootstrap_iters=0,
                    log_samples=False,
                    apply_chat_template=bool(benchmark.chat_template),
                    fewshot_as_multiturn=bool(benchmark.chat_template),
                )
        return {
            f"benchmark/{benchmark.name}/{_metric(key)}": float(value)
            for key, value in results["results"][task.name].items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }


def _metric(key: str) -> str:
    """`acc,none` is acc, `exact_match,strict` is exact_match.strict."""
    metric, _, answer_filter = key.partition(",")
    name = metric if answer_filter == "none" else f"{metric}.{answer_filter}"
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def _stay_offline(cache: Path) -> None:
    """Says so to libraries that read it when they are imported; our own downloads do not go through them."""
    cache.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    os.environ.setdefault("HF_DATASETS_CACHE", str(cache))
    os.environ.setdefault("HF_MODULES_CACHE", str(cache / "modules"))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what it warns of may quote rows
    import datasets

    datasets.config.HF_DATASETS_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()


@contextmanager
def _templates(*, sandboxed: bool) -> Iterator[None]:
    """Templates of a task can reach Python through the attributes of a string; in the sandbox they cannot."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    before = utils.env
    if sandboxed:
        utils.env = ImmutableSandboxedEnvironment(
            loader=before.loader, undefined=before.undefined, keep_trailing_newline=True
        )
        utils.env.filters |= before.filters
    try:
        yield
    finally:
        utils.env = before


@contextmanager
def _told(task: TaskFile, doing: str) -> Iterator[None]:
    """Trouble of the harness as trouble of the task. Its words may quote rows, so only their kind is told."""
    from jinja2 import TemplateError

    try:
        yield
    except (*_WRONG, TemplateError) as error:
        raise UserError(
            f"evaluation.benchmarks {task.benchmark.name}: lm-evaluation-harness cannot {doing} task {task.name} ({type(error).__name__}); try it with `lm_eval --tasks {task.path.name}` where its files are"
        ) from error


def _loaded(task: TaskFile, cache: Path) -> Any:
    """The task as the harness has it."""
    from lm_eval.api.registry import get_metric, metric_registry
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    get_metric("acc")  # fills the registry
    config = load_yaml(task.path) if task.config is None else copy.deepcopy(task.config)
    own = config.get("process_results") is not None
    for metric in config.get("metric_list") or ():
        name = metric.get("metric")
        if isinstance(name, str) and not own and name not in metric_registry:
            raise UserError(
                f"evaluation.benchmarks {task.benchmark.name}: metric {name} is none of the harness's own and would be downloaded; there are {', '.join(sorted(metric_registry))}"
            )
    if task.data_files:
        options = {key: value for key, value in config["dataset_kwargs"].items() if key != "trust_remote_code"}
        config["dataset_kwargs"] = options | {"data_files": task.data_files, "cache_dir": str(cache)}
    few_shot, given = task.benchmark.few_shot, config.get("num_fewshot")
    if few_shot and given == 0:
        raise UserError(
            f"evaluation.benchmarks {task.benchmark.name}: fewShot is {few_shot}, and the task says num_fewshot: 0; remove one of the two"
        )
    loaded: Any = TaskManager(include_defaults=False).load([config])
    (only,) = loaded["tasks"].values()
    only.set_config(key="num_fewshot", value=(given or 0) if few_shot is None else few_shot)
    only.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


def _answering(model: Model, tokenizer: Any, tokens: int, ranks: Ranks, stopping: Callable[[], bool]) -> Any:
    """Our model as the harness sees one. A class made here, since its base is imported late."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    class InMemory(TemplateLM):  # type: ignore[misc]
        """Tokenises and cuts as the harness's own HFLM does, so that its numbers are the same; batches are without padding."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self._device = ranks.device
            taken = anatomy.first_position(model.inner.config) + (model.virtual.length if model.virtual else 0)
            self.max_length = int(getattr(model.inner.config, "max_position_embeddings", 2048)) - taken

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return "model"

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return rendered(tokenizer, chat_history, ask=add_generation_prompt, goes_on=not add_generation_prompt)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None and string.startswith(tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
            chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer(string, **chosen)["input_ids"])

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Scored]:
            found: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[Scored]:
            return self._shared(requests, self._scored)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            windows, counts = [], []
            for request in requests:
                (text,) = request.args
                cut = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                parts = [("", *utils.make_disjoint_window(window)) for window in cut]
                windows += parts
                counts.append(len(parts))
            scored = iter(self._loglikelihood_tokens(windows))
            return [sum(next(scored)[0] for _ in range(count)) for count in counts]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            return self._shared([request.args for request in requests], self._written)

        def _shared(self, requests: Sequence[Any], answer: Callable[[Sequence[Any]], Iterator[Any]]) -> list[Any]:
            """Answers to all requests, of which this rank makes every world-th."""
            mine: list[Any] = []
            stopped = False
            for answers in answer(requests[ranks.rank :: ranks.world]):
                mine += answers
                if stopped := stopping():
                    break
            if ranks.any(stopped):
                raise _Stopped
            found: list[Any] = [None] * len(requests)
            for rank, theirs in enumerate(ranks.gather(mine)):
                found[rank :: ranks.world] = theirs
            return found

        def _scored(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> Iterator[list[Scored]]:
            rows: list[tuple[list[int], list[int]]] = []
            held = 0
            for _, context, continuation in requests:
                if not 0 < len(continuation) <= self.max_length:
                    raise ValueError("a continuation without tokens, or longer than the model reads")
                row = (context + continuation)[-(self.max_length + 1) :][:-1]
                if rows and held + len(row) > tokens:
                    yield self._score(rows)
                    rows, held = [], 0
                rows.append((row, continuation))
                held += len(row)
            if rows:
                yield self._score(rows)

        def _score(self, rows: list[tuple[list[int], list[int]]]) -> list[Scored]:
            """(row without its last token, continuation) of each: one forward pass."""
            ends = np.cumsum([len(row) for row, _ in rows])
            flat = Flat(
                np.arange(len(rows)),
                list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)),
                np.concatenate([np.array(row, dtype=np.int64) for row, _ in rows]),
            )
            counts = [len(continuation) for _, continuation in rows]
            at = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
            wanted = np.concatenate([np.array(continuation, dtype=np.int64) for _, continuation in rows])
            batch = flat.on(ranks.device, at, wanted)
            states = model.hidden(batch)
            assert isinstance(model.head, nn.Linear)
            size = max(1, CHUNK_BYTES // (4 * model.head.weight.shape[0]))
            said, likely = [], []
            for part, targets in zip(_cut(states, size), _cut(batch.targets, size), strict=True):
                logits = model.logits(part).float()
                chosen = logits.gather(1, targets[:, None])[:, 0]
                said.append(chosen - logits.logsumexp(dim=-1))
                likely.append(logits.argmax(dim=-1) == targets)
            sums = _cut(torch.cat(said).double().cpu(), counts)
            hits = _cut(torch.cat(likely).cpu(), counts)
            return [(float(one.sum()), bool(hit.all())) for one, hit in zip(sums, hits, strict=True)]

        def _written(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[str]]:
            for text, given in requests:
                options: Any = normalize_gen_kwargs(given, MOST_NEW_TOKENS)
                until = handle_stop_sequences(list(options["until"]), eos=tokenizer.decode(self.eot_token_id))
                most = options["max_gen_toks"]
                if most >= self.max_length:
                    raise ValueError("an answer as long as all that the model reads")
                bos = tokenizer.bos_token
                special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
                asked = list(tokenizer(text, **special)["input_ids"])[-(self.max_length - most) :]
                said = samples.go_on(model, tokenizer, asked, most, ranks.device, [stop for stop in until if stop])
                yield [postprocess_generated_text(tokenizer.decode(said, skip_special_tokens=True), until, None)]

    return InMemory()


def _cut(tensor: Tensor, sizes: int | list[int]) -> tuple[Tensor, ...]:
    return torch.split(tensor, sizes)
