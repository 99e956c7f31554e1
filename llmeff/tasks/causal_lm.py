"""Causal language modelling: predict each token from the tokens before it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmeff.core import group
from llmeff.core.config import ConfigError, Count
from llmeff.core.dist import World
from llmeff.core.heartbeat import beat
from llmeff.core.ignored import IGNORED_TOKEN
from llmeff.core.layout import Layout
from llmeff.core.metric import Direction
from llmeff.core.parameters import ParameterInfo, parameter_infos
from llmeff.core.seed import derive
from llmeff.cost.workload import Workload
from llmeff.data import TextCorpus, TextData
from llmeff.data.hf_tokenizer import read_backend
from llmeff.data.packing import TokenBatch
from llmeff.data.splits import Split
from llmeff.data.tokenizer import Tokenizer
from llmeff.models import LanguageModelConfig, save_model
from llmeff.tasks.task import Batch, Sample, Task, TaskConfig, UnitResult

_EVAL_LOGITS = 2**24
"""Maximum number of logits in memory at once in evaluation. A vocabulary counts as at least 2,048 tokens, so that small
vocabularies leave memory for activations."""
_TEMPERATURE = 0.8
"""Temperature at which text is sampled."""


def tokenizer_problems(model: LanguageModelConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields a problem if ids of the tokenizer meant other tokens when the model's weights were trained.

    Ids that only one of the two tokenizers has are allowed: a tokenizer may add tokens or leave tokens out.
    """
    folder = model.tokenizer_folder()
    if folder is None:
        return
    trained, given = (
        {place: token for token, place in backend.get_vocab(with_added_tokens=True).items()}
        for backend in (read_backend(folder), tokenizer.backend)
    )
    changed = sorted(place for place in trained.keys() & given.keys() if trained[place] != given[place])
    if changed:
        first = changed[0]
        yield (
            f"data.tokenizer: id {first} is {given[first]!r}, but it was {trained[first]!r} when the weights in "
            f"{folder} were trained; {len(changed)} ids differ. Allowed: the tokenizer of the weights (data.tokenizer "
            f"= {{name = 'hf', path = '{folder}'}}), a tokenizer that only adds tokens to it or leaves tokens out, or "
            "any tokenizer with model.from_scratch = true"
        )


class CausalLM(TaskConfig[LanguageModelConfig, TextData]):
    """Causal language modelling. The loss is the cross-entropy of the next token, in nats.

    Evaluation also gives the bits per byte of held-out documents.
    """

    metric_directions: ClassVar[dict[str, Direction]] = {"loss": "lower", "bits_per_byte": "lower"}
    needed_model: ClassVar[str] = "a language model"
    needed_data: ClassVar[str] = "text"

    name: Literal["causal_lm"] = "causal_lm"
    loss_chunk: Count | Literal["auto"] | None = "auto"
    """Number of tokens whose logits are in memory at once. It changes the memory, not the loss. null: all tokens. auto:
    256 tokens if the vocabulary has more than 1,024 tokens and the model supports it, otherwise all tokens."""

    def resolve_chunk(self, model: LanguageModelConfig) -> int | None:
        """Returns `loss_chunk` as a number of tokens, or None for all tokens."""
        if self.loss_chunk == "auto":
            return 256 if model.vocabulary() > 1024 and model.chunks_logits() else None
        return self.loss_chunk

    def infer_model(self, model: LanguageModelConfig, data: TextData) -> LanguageModelConfig | None:
        """Returns the model with its vocabulary size, or None if this first needs the trained tokenizer.

        The trained tokenizer is needed if the model's size is "auto" and the tokenizer's config gives no size. It is
        also needed if the tokenizer's config gives a larger size than the model's, because the trained tokenizer may
        have fewer tokens than its config allows.
        """
        known = data.tokenizer.vocabulary()
        if model.vocab_size == "auto":
            return None if known is None else model.model_copy(update={"vocab_size": known})
        # a tokenizer that is not trained yet may get fewer tokens than its config allows, and then fit
        return model if known is None or known <= model.vocab_size else None

    def items(self, data: TextData) -> int:
        """Returns the number of tokens in a window."""
        return data.sequence_length

    def workload(self, model: LanguageModelConfig, data: TextData) -> Workload:
        """Returns the workload of one window, with logits in chunks as in training."""
        return Workload(
            num_sequences=1,
            num_tokens=data.sequence_length,
            loss_chunk=self.resolve_chunk(model),
            packed=data.packing == "documents",
        )

    def open(
        self, data: TextData, seed: int, batch_size: int, *, is_main: bool, wait: Callable[[], None]
    ) -> "CausalLMTask":
        """Opens the corpus, after tokenizing it if it is not cached, and returns the task."""
        return CausalLMTask(self, data, data.open(is_main=is_main, wait=wait), seed, batch_size)


class CausalLMTask(Task[LanguageModelConfig]):
    """Causal language modelling on a corpus that is already open."""

    item = "token"

    def __init__(self, config: CausalLM, data: TextData, corpus: TextCorpus, seed: int, batch_size: int):
        self.corpus = corpus
        self._data = data
        self._sample_seed, self._order_seed = derive(seed, "sample"), derive(seed, "data")
        self._batch_size = batch_size
        self.items_per_step = batch_size * config.items(data)
        self._config = config
        # Make the windows now, so that a corpus that is too short fails here, not hours later.
        self._windows = corpus.train

    def resolve(self, model: LanguageModelConfig) -> LanguageModelConfig:
        """Returns the model with its vocabulary size, after checking that the model fits the tokenizer."""
        if model.vocab_size == "auto":
            model = model.model_copy(update={"vocab_size": self.corpus.vocab_size})
        self.corpus.check_vocabulary(model.vocabulary())
        problems = list(tokenizer_problems(model, self.corpus.tokenizer))
        if problems:
            raise ConfigError(problems)
        self._loss_chunk = self._config.resolve_chunk(model)
        return model

    def parameter_infos(self, model: nn.Module) -> list[ParameterInfo]:
        """Returns the parameters to train, with the roles that the model gives them."""
        return parameter_infos(model, model.roles())  # type: ignore[operator]  # a method of every language model

    def batch(self, step: int, rows: range, device: torch.device) -> Batch:
        """Returns (B, T) tokens and targets, with their layout if there is a document mask."""
        packed = self._windows.batch(self._order_seed, step, rows, self._batch_size)
        targets = torch.from_numpy(packed.targets)
        inputs = {
            "tokens": torch.from_numpy(packed.tokens).to(device, non_blocking=True),
            "layout": _layout(packed, device),
            "targets": targets.to(device, non_blocking=True),
            "loss_chunk": self._loss_chunk,
        }
        num_targets = int((packed.targets != IGNORED_TOKEN).sum())
        return Batch(inputs=inputs, counts={"loss": num_targets}, items=num_targets)

    def unit_ids(self, step: int, rows: range) -> list[str]:
        """Returns the names of the documents in the rows."""
        return self._windows.batch(self._order_seed, step, rows, self._batch_size).units()

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Returns the cross-entropy, summed over the batch's targets."""
        return {"loss": model(**batch.inputs)}

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, max_units: int | None, device: torch.device, world: World
    ) -> Iterator[UnitResult]:
        """Yields each document's cross-entropy, summed over its tokens and the end token after it.

        If a document spans several windows, no window sees the tokens of another.
        """
        split = cast(Split, split)
        stream = self.corpus.stream(split)
        limit = None
        if max_units is not None and max_units < len(stream.document_bytes):
            limit = int(stream.starts[max_units])
        windows = self.corpus.eval_windows(split, max_tokens=limit)
        sums = np.zeros(len(windows.document_bytes))
        counts = np.zeros(len(windows.document_bytes), dtype=np.int64)
        rows = max(1, _EVAL_LOGITS // max(self.corpus.vocab_size, 2048) // self._data.sequence_length)
        for start in range(0, windows.num_windows, rows * world.ranks):
            low = start + rows * world.rank
            mine = range(low, min(low + rows, windows.num_windows))
            beat()
            # a rank without rows runs the model too, because other ranks may need its shard of the parameters
            packed = windows.batch(mine or range(1))
            tokens = torch.from_numpy(packed.tokens).to(device)
            logits = model(tokens, _layout(packed, device)).float()
            targets = torch.from_numpy(packed.targets).to(device)
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_TOKEN, reduction="none"
            )
            if not mine:
                continue
            counted = packed.target_documents.ravel() >= 0
            documents = packed.target_documents.ravel()[counted]
            sums += np.bincount(documents, losses.double().cpu().numpy()[counted], len(sums))
            counts += np.bincount(documents, minlength=len(counts))
        sums, counts = (group.total(torch.from_numpy(mine)).numpy() for mine in (sums, counts))
        for unit, loss_sum, count, num_bytes in zip(windows.units, sums, counts, windows.document_bytes, strict=True):
            yield UnitResult(unit=unit, loss_sum=float(loss_sum), count=int(count), metrics={"bytes": float(num_bytes)})

    def summary(self, results: list[UnitResult]) -> dict[str, float]:
        """Returns the loss in nats per token, and in bits per byte of the documents' text."""
        loss_sum = math.fsum(result.loss_sum for result in results)
        num_bytes = sum(result.metrics["bytes"] for result in results)
        return {
            "loss": loss_sum / sum(result.count for result in results),
            "bits_per_byte": loss_sum / math.log(2) / max(1.0, num_bytes),
        }

    def check_split(self, split: str) -> None:
        """Raises an error if the split has no documents."""
        self.corpus.stream(cast(Split, split))

    def references(self, split: str) -> dict[str, float]:
        """Returns the bits per byte of the split's documents, concatenated and compressed by `gzip -9`."""
        facts = self.corpus.splits.get(cast(Split, split))
        if facts is None or facts.gzip_bits_per_byte is None:
            return {}
        return {"gzip_bits_per_byte": facts.gzip_bits_per_byte}

    @torch.no_grad()
    def sample(self, model: nn.Module, split: str, num_tokens: int, device: torch.device) -> Sample:
        """Returns text that is sampled from the model token by token, from the start of a document."""
        generator = torch.Generator().manual_seed(self._sample_seed)
        ids = [self.corpus.end_id]
        for _ in range(num_tokens):
            beat()
            context = torch.tensor([ids[-self._data.sequence_length :]], device=device)
            logits = model(context)[0, -1, : self.corpus.vocab_size]
            probabilities = F.softmax(logits.float().cpu() / _TEMPERATURE, dim=-1)
            ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return Sample(text=self.corpus.tokenizer.decode(ids[1:]))

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes weights, config and tokenizer in the format that transformers' Auto classes load."""
        save_model(model, folder, max_length=self._data.sequence_length, end_id=self.corpus.end_id)
        self.corpus.tokenizer.save(folder)

    def facts(self) -> dict[str, Any]:
        """Returns the name, hash and sizes of the corpus."""
        return {
            "name": self.corpus.name,
            "sha256": self.corpus.fingerprint,
            "vocab_size": self.corpus.vocab_size,
            "splits": {split: asdict(facts) for split, facts in self.corpus.splits.items()},
        }


def _layout(packed: TokenBatch, device: torch.device) -> Layout | None:
    """Returns the layout of packed documents, or None if there is no document mask and causal attention suffices."""
    if packed.positions is None or packed.documents is None:
        return None
    return Layout(
        positions=torch.from_numpy(packed.positions).to(device),
        documents=torch.from_numpy(packed.documents).to(device),
    )
