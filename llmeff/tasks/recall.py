"""Recall: answer questions about earlier tokens of the row."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.core import group
from llmeff.core.config import ConfigError
from llmeff.core.dist import World
from llmeff.core.heartbeat import beat
from llmeff.core.ignored import IGNORED_TOKEN
from llmeff.core.metric import Direction
from llmeff.core.parameters import ParameterInfo, parameter_infos
from llmeff.core.seed import derive
from llmeff.cost.workload import Workload
from llmeff.data.recall import HELD_OUT, RecallData
from llmeff.models import LanguageModelConfig, save_model
from llmeff.tasks.task import Batch, Sample, Task, TaskConfig, UnitResult

_EVAL_LOGITS = 2**22
"""Maximum number of logits in memory at once in evaluation. A token counts as at least `_LEAST_VOCABULARY` logits."""
_LEAST_VOCABULARY = 256
_NUM_SHOWN = 4
"""Number of rows in the sample at the end of a run."""


class Recall(TaskConfig[LanguageModelConfig, RecallData]):
    """Recall of earlier tokens. The loss is the cross-entropy of the answers, in nats.

    Evaluation also gives the accuracy, the share of right answers.
    """

    metric_directions: ClassVar[dict[str, Direction]] = {"loss": "lower", "accuracy": "higher"}
    needed_model: ClassVar[str] = "a language model"
    needed_data: ClassVar[str] = "questions"
    data_hint: ClassVar[str] = ": use data 'recall'"

    name: Literal["recall"] = "recall"

    def infer_model(self, model: LanguageModelConfig, data: RecallData) -> LanguageModelConfig:
        """Returns the model with its vocabulary size."""
        return _with_vocabulary(model, data)

    def items(self, data: RecallData) -> int:
        """Returns the number of tokens in a row."""
        return data.sequence_length

    def workload(self, model: LanguageModelConfig, data: RecallData) -> Workload:
        """Returns the workload of one row."""
        return Workload(num_sequences=1, num_tokens=data.sequence_length)

    def open(
        self, data: RecallData, seed: int, batch_size: int, *, is_main: bool, wait: Callable[[], None]
    ) -> "RecallTask":
        """Returns the task. Rows are generated, so no data is read."""
        return RecallTask(data, seed, batch_size)


def _with_vocabulary(model: LanguageModelConfig, data: RecallData) -> LanguageModelConfig:
    if model.vocab_size == "auto":
        return model.model_copy(update={"vocab_size": data.vocab_size})
    if model.vocabulary() < data.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocabulary()}, but data.vocab_size is {data.vocab_size}. The model needs at "
            "least as many ids as the data"
        )
    return model


class RecallTask(Task[LanguageModelConfig]):
    """Recall on generated rows."""

    item = "token"

    def __init__(self, data: RecallData, seed: int, batch_size: int):
        self._data, self._order_seed = data, derive(seed, "data")
        self.items_per_step = batch_size * data.sequence_length

    def resolve(self, model: LanguageModelConfig) -> LanguageModelConfig:
        """Returns the model with its vocabulary size."""
        return _with_vocabulary(model, self._data)

    def parameter_infos(self, model: nn.Module) -> list[ParameterInfo]:
        """Returns the parameters to train, with the roles that the model gives them."""
        return parameter_infos(model, model.roles())  # type: ignore[operator]  # a method of every language model

    def batch(self, step: int, rows: range, device: torch.device) -> Batch:
        """Returns (B, T) tokens and targets. The loss is averaged over the answers."""
        given = self._data.train_rows(self._order_seed, step, rows)
        inputs = {
            "tokens": torch.from_numpy(given.tokens).to(device, non_blocking=True),
            "targets": torch.from_numpy(given.targets).to(device, non_blocking=True),
        }
        return Batch(
            inputs=inputs, counts={"loss": int((given.targets != IGNORED_TOKEN).sum())}, items=given.tokens.size
        )

    def unit_ids(self, step: int, rows: range) -> list[str]:
        """Returns a name for each row, made of the step and the row's index."""
        return [f"step {step}, row {row}" for row in rows]

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy, summed over the answers."""
        return {"loss": model(**batch.inputs)}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, max_units: int | None, device: torch.device, world: World
    ) -> Iterator[UnitResult]:
        """Yields each row's cross-entropy and number of right answers. The ranks share the rows."""
        num_rows = self._data.held_out if max_units is None else min(max_units, self._data.held_out)
        found, start, at_once = np.zeros((num_rows, 2)), 0, 1  # the first row shows how many logits a token has
        while start < num_rows:
            low = start + at_once * world.rank
            mine = range(low, min(low + at_once, num_rows))
            beat()
            # a rank without rows runs the model too, because other ranks may need its shard of the parameters
            given = self._data.held_out_rows(split, mine or range(1))
            logits = model(torch.from_numpy(given.tokens).to(device)).float().cpu()
            targets = torch.from_numpy(given.targets)
            losses = F.cross_entropy(logits.mT, targets, ignore_index=IGNORED_TOKEN, reduction="none").double().sum(-1)
            right = (logits.argmax(-1) == targets).sum(-1)
            if mine:
                found[mine.start : mine.stop] = np.stack((losses.numpy(), right.numpy()), axis=-1)
            start += at_once * world.ranks
            at_once = max(1, _EVAL_LOGITS // (logits.shape[1] * max(logits.shape[2], _LEAST_VOCABULARY)))
        found = group.total(torch.from_numpy(found)).numpy()
        for row, (loss_sum, num_right) in enumerate(found.tolist()):
            yield UnitResult(
                unit=f"{split}/{row}", loss_sum=loss_sum, count=self._data.questions(), metrics={"right": num_right}
            )

    def summary(self, results: list[UnitResult]) -> dict[str, float]:
        """Returns the loss in nats per answer, and the share of right answers."""
        num_asked = sum(result.count for result in results)
        return {
            "loss": math.fsum(result.loss_sum for result in results) / num_asked,
            "accuracy": sum(result.metrics["right"] for result in results) / num_asked,
        }

    def check_split(self, split: str) -> None:
        """Accepts every held-out split, because all have rows."""
        assert split in HELD_OUT

    def references(self, split: str) -> dict[str, float]:
        """Returns an empty dict, because this task has no baselines.

        A random guess has an accuracy of one over the number of values.
        """
        return {}

    @torch.no_grad()
    def sample(self, model: nn.Module, split: str, num_tokens: int, device: torch.device) -> Sample:
        """Returns the model's answers for a few rows, with the right answer after each wrong one."""
        given = self._data.held_out_rows(split, range(min(_NUM_SHOWN, self._data.held_out)))
        answers = model(torch.from_numpy(given.tokens).to(device)).argmax(-1).cpu().numpy()
        lines = []
        for tokens, targets, predicted in zip(given.tokens, given.targets, answers, strict=True):
            asked = np.flatnonzero(targets != IGNORED_TOKEN)
            pairs = (
                f"{tokens[t]}: {predicted[t]}" + ("" if predicted[t] == targets[t] else f" (not {targets[t]})")
                for t in asked
            )
            lines.append(", ".join(pairs))
        return Sample(text="\n".join(lines))

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes weights and config in the format that transformers' Auto classes load."""
        save_model(model, folder, max_length=self._data.sequence_length, end_id=0)

    def facts(self) -> dict[str, Any]:
        """Returns the kind of rows, their fingerprint and the size of the vocabulary."""
        return {"name": self._data.kind, "sha256": self._data.fingerprint(), "vocab_size": self._data.vocab_size}
