"""Interface of a task, which connects the model, the data, the loss and the metrics of a run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from llmeff.core.config import Component, Text
from llmeff.core.dist import World
from llmeff.core.metric import Direction
from llmeff.core.parameters import ParameterInfo
from llmeff.cost.workload import Workload
from llmeff.data import DataConfig
from llmeff.models import ModelConfig

# By default, the types allow any model and data. Their kinds are checked when a run's config is validated.
ModelT = TypeVar("ModelT", bound=ModelConfig, default=Any)
DataT = TypeVar("DataT", bound=DataConfig, default=Any)

ITEMS = "items of the step"
"""Key of the number of items in `Batch.totals`, whose other keys are the names of losses."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A part of one step's global batch."""

    inputs: dict[str, Any]
    """Arguments of the model's forward, by name."""
    targets: Any = None
    """Targets that the loss compares with the model's output. None if forward itself takes the targets."""
    counts: dict[str, float]
    """Contribution of this batch to the divisor of each loss, by the name of the loss: a number of items, or a sum of
    weights. It depends on the data alone."""
    items: int
    """Number of tokens or pixels in this batch that count as trained on."""

    def totals(self) -> dict[str, float]:
        """Returns the counts that are summed over all batches of a step: the divisors of the losses, and the items."""
        return {**self.counts, ITEMS: self.items}


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """Evaluation result of one held-out unit: a document, an image or a row."""

    unit: str
    """Name of the unit."""
    loss_sum: float
    """Loss in nats, summed over the unit."""
    count: int
    """Number of tokens or pixels in that sum."""
    metrics: dict[str, float]
    """Other values of the unit, by name, such as its number of bytes (`bytes`)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sample of a trained model's output, for people to look at."""

    text: str | None = None
    """Text that is shown in the terminal and kept in the result. None if the sample is a picture."""
    picture: bytes | None = None
    """Content of a PNG file that is written into the run's folder. None if the sample is text."""


class Task(ABC, Generic[ModelT]):
    """Connects model, data, loss and metrics. The rows of a step are a pure function of (seed, step)."""

    item: str
    """Name, in the singular, of the items that training counts (`token`, `pixel`)."""
    items_per_step: int
    """Maximum number of items that a step trains on."""

    @abstractmethod
    def resolve(self, model: ModelT) -> ModelT:
        """Returns the model's config with the fields that depend on the data, such as the size of the vocabulary.

        Raises:
            ConfigError: the model does not fit the data.
        """

    @abstractmethod
    def parameter_infos(self, model: nn.Module) -> list[ParameterInfo]:
        """Returns the parameters to train."""

    @abstractmethod
    def batch(self, step: int, rows: range, device: torch.device) -> Batch:
        """Returns some rows of a step's global batch. The step is the same, however its rows are split into batches.

        Args:
            step: index of the step, from 0.
            rows: indices of the rows in the global batch.
            device: device of the tensors.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Returns summed losses by name. The training loop divides each by its count in the step, and adds them."""

    @abstractmethod
    def unit_ids(self, step: int, rows: range) -> list[str]:
        """Returns the names of the documents or images in rows of a step, for diagnosis."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: str, max_units: int | None, device: torch.device, world: World
    ) -> Iterator[UnitResult]:
        """Yields the results of a split's units. The ranks share the work, and every rank gets all results.

        Args:
            model: the model, in evaluation mode.
            split: the split to evaluate.
            max_units: maximum number of units. None for all.
            device: device of the model.
            world: this rank and the number of ranks.
        """

    @abstractmethod
    def summary(self, results: list[UnitResult]) -> dict[str, float]:
        """Returns the metrics of all units together, such as `loss` and `bits_per_byte`."""

    @abstractmethod
    def check_split(self, split: str) -> None:
        """Raises an error if a split is empty.

        Raises:
            ConfigError: the split is empty. The error gives the sizes of the splits.
        """

    @abstractmethod
    def references(self, split: str) -> dict[str, float]:
        """Returns baselines for a run's metrics on a split, from the data alone, such as `gzip_bits_per_byte`."""

    @abstractmethod
    def sample(self, model: nn.Module, split: str, num_tokens: int, device: torch.device) -> Sample:
        """Returns a sample at the end of a run: `num_tokens` tokens of text, or results of a few units of the split.

        All ranks must call it.
        """

    @abstractmethod
    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes the trained model, with everything that is needed to use it, as safetensors and JSON."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Returns the facts about the data that a run records: names, sizes, and a `sha256` of all that is read."""


class TaskConfig(Component, Generic[ModelT, DataT], family="task"):
    """Config of a run's task.

    The base class of a task declares the models and the data that it works with, as in `class
    CausalLM(TaskConfig[LanguageModelConfig, TextData])`. `problems` checks their types once, so all other methods may
    rely on them.
    """

    model_kind: ClassVar[type[ModelConfig]] = ModelConfig
    """Type of the models that the task works with, as its base class declares."""
    data_kind: ClassVar[type[DataConfig]] = DataConfig
    """Type of the data that the task works with, as its base class declares."""
    needed_model: ClassVar[str]
    """Name of `model_kind` in errors ("a language model")."""
    needed_data: ClassVar[str]
    """Name of `data_kind` in errors ("text")."""
    data_hint: ClassVar[str] = ""
    """End of the error about data of another kind (": use data 'recall'")."""
    metric_directions: ClassVar[dict[str, Direction]]
    """Metrics of `Task.summary` by which runs are compared, and which direction is better. Runs are compared by ratios,
    so the values must be positive."""

    name: Text
    """The kind of task."""

    @classmethod
    def __pydantic_init_subclass__(cls, family: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(family, **kwargs)
        kinds = cls.__pydantic_generic_metadata__["args"]
        if kinds:
            cls.model_kind, cls.data_kind = kinds

    def problems(self, model: ModelConfig, data: DataConfig) -> Iterator[str]:
        """Yields the reasons why the task cannot work with the model and the data, including `model_problems`."""
        if isinstance(model, self.model_kind):
            yield from self.model_problems(cast(ModelT, model))
        else:
            yield f"task {self.name!r} needs {self.needed_model}, but model {model.name!r} is not one"
        if not isinstance(data, self.data_kind):
            yield f"task {self.name!r} needs {self.needed_data}, but data {data.name!r} provides none{self.data_hint}"

    def model_problems(self, model: ModelT) -> Iterator[str]:
        """Yields the reasons why the task cannot work with a model of the right kind."""
        yield from ()

    def infer_model(self, model: ModelT, data: DataT) -> ModelT | None:
        """Returns the result of `Task.resolve` from the configs alone, or None if it depends on the data's content."""
        return None

    def items(self, data: DataT) -> int:
        """Returns the number of items in a training row: tokens in a sequence, or pixels in an image."""
        raise NotImplementedError(type(self))

    def workload(self, model: ModelT, data: DataT) -> Workload:
        """Returns the workload of a step with one sequence or image."""
        raise NotImplementedError(type(self))

    def open(self, data: DataT, seed: int, batch_size: int, *, is_main: bool, wait: Callable[[], None]) -> Task[ModelT]:
        """Opens the data and returns the task.

        Args:
            data: the data to open.
            seed: the run's seed, from which the order of the data follows.
            batch_size: number of rows in a step's global batch.
            is_main: whether this process writes caches.
            wait: returns once all processes have called it.
        """
        raise NotImplementedError(type(self))
