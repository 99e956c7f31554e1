"""The contract of a task, which joins model, data, loss and metrics."""

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

# Without arguments a task accepts any model and data: their kinds are checked when a run is validated.
ModelT = TypeVar("ModelT", bound=ModelConfig, default=Any)
DataT = TypeVar("DataT", bound=DataConfig, default=Any)

ITEMS = "items of the step"
"""The name under which `Batch.totals` counts items, beside the names of losses."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A share of one step's global batch."""

    inputs: dict[str, Any]
    """Arguments of the model's forward, by name."""
    targets: Any = None
    """What the loss compares with the model's output; None if forward takes it."""
    counts: dict[str, float]
    """This share's part of each loss's divisor, by the loss's name: items or weights, known from the data alone."""
    items: int
    """Tokens or pixels of this share that count as trained on."""

    def totals(self) -> dict[str, float]:
        """Counts that are summed over all shares of a step: the divisors of the losses, and the items."""
        return {**self.counts, ITEMS: self.items}


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """The result of one held-out unit: a document, an image or a row."""

    unit: str
    """The unit's name."""
    loss_sum: float
    """The loss, summed over the unit, in nats."""
    count: int
    """The number of tokens or pixels in that sum."""
    metrics: dict[str, float]
    """Other sums over the unit, by name (`bytes`)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A sample of what a trained model makes, for people to look at."""

    text: str | None = None
    """Shown in the terminal and kept in the result."""
    picture: bytes | None = None
    """A PNG, written into the run's folder."""


class Task(ABC, Generic[ModelT]):
    """Joins model, data, loss and metrics. The rows of a step are a pure function of (seed, step)."""

    item: str
    """The item that the loss is a mean over, in the singular (`token`, `pixel`)."""
    items_per_step: int
    """The most items that a step's loss is a mean over."""

    @abstractmethod
    def resolve(self, model: ModelT) -> ModelT:
        """Fills in what only the data tell of the model's config, such as the size of a vocabulary.

        Raises:
            ConfigError: the model does not fit the data.
        """

    @abstractmethod
    def parameter_infos(self, model: nn.Module) -> list[ParameterInfo]:
        """The parameters to train."""

    @abstractmethod
    def batch(self, step: int, rows: range, device: torch.device) -> Batch:
        """Some rows of a step's global batch; the step is the same however rows are split.

        Args:
            step: from 0.
            rows: of the global batch.
            device: that the tensors are put on.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Summed losses by name; the loop divides each by its global count once, and adds them."""

    @abstractmethod
    def unit_ids(self, step: int, rows: range) -> list[str]:
        """The names of the documents or images in rows of a step, for a diagnosis."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: str, max_units: int | None, device: torch.device, world: World
    ) -> Iterator[UnitResult]:
        """The results of a split's units, which the ranks evaluate together; every rank gets all of them.

        Args:
            model: in evaluation mode.
            split: which units.
            max_units: the most units; None: all.
            device: of the model.
            world: this rank and the number of ranks.
        """

    @abstractmethod
    def summary(self, results: list[UnitResult]) -> dict[str, float]:
        """The metrics of all units together (`loss`, `bits_per_byte`)."""

    @abstractmethod
    def check_split(self, split: str) -> None:
        """Refuses an empty split.

        Raises:
            ConfigError: with the sizes of the splits.
        """

    @abstractmethod
    def references(self, split: str) -> dict[str, float]:
        """Values to compare a run's metrics on a split with, from the data alone (`gzip_bits_per_byte`)."""

    @abstractmethod
    def sample(self, model: nn.Module, split: str, num_tokens: int, device: torch.device) -> Sample:
        """A sample at the end of a run: `num_tokens` tokens of text, or results of a few of the split's units.

        All ranks call it.
        """

    @abstractmethod
    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes the trained model, with all that is needed to use it, as safetensors and JSON."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the record says about the data: names, sizes, and a `sha256` of all that is read."""


class TaskConfig(Component, Generic[ModelT, DataT], family="task"):
    """The task of a run.

    A task states in its base class which models and data it works with: `class CausalLM(TaskConfig[LanguageModelConfig,
    TextData])`. `problems` checks them once; all other methods may rely on them.
    """

    model_kind: ClassVar[type[ModelConfig]] = ModelConfig
    """The models that the task works with, as its base class states."""
    data_kind: ClassVar[type[DataConfig]] = DataConfig
    """The data that the task works with, as its base class states."""
    needed_model: ClassVar[str]
    """`model_kind` in the words of an error ("a language model")."""
    needed_data: ClassVar[str]
    """`data_kind` in the words of an error ("text")."""
    data_hint: ClassVar[str] = ""
    """The end of the error about data of another kind (": use data 'recall'")."""
    metric_directions: ClassVar[dict[str, Direction]]
    """The metrics of `Task.summary` that runs are compared by, and which direction is better. They are compared by
    ratios, so their values must be positive."""

    name: Text
    """The task's name."""

    @classmethod
    def __pydantic_init_subclass__(cls, family: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(family, **kwargs)
        kinds = cls.__pydantic_generic_metadata__["args"]
        if kinds:
            cls.model_kind, cls.data_kind = kinds

    def problems(self, model: ModelConfig, data: DataConfig) -> Iterator[str]:
        """Why the task cannot work with the model and the data: their kinds, and `model_problems`."""
        if isinstance(model, self.model_kind):
            yield from self.model_problems(cast(ModelT, model))
        else:
            yield f"task {self.name!r} needs {self.needed_model}; model {model.name!r} is none"
        if not isinstance(data, self.data_kind):
            yield f"task {self.name!r} needs {self.needed_data}; data {data.name!r} is none{self.data_hint}"

    def model_problems(self, model: ModelT) -> Iterator[str]:
        """Why the task cannot work with a model of the right kind."""
        yield from ()

    def infer_model(self, model: ModelT, data: DataT) -> ModelT | None:
        """What `Task.resolve` will return, from the configs alone; None if only the data tell."""
        return None

    def items(self, data: DataT) -> int:
        """Tokens in one sequence, or pixels in one image, that the loss is a mean over."""
        raise NotImplementedError(type(self))

    def workload(self, model: ModelT, data: DataT) -> Workload:
        """A step with one sequence or image, as the laws see it."""
        raise NotImplementedError(type(self))

    def open(self, data: DataT, seed: int, batch_size: int, *, is_main: bool, wait: Callable[[], None]) -> Task[ModelT]:
        """Opens the data and returns the task.

        Args:
            data: the data to open.
            seed: of the order of the data.
            batch_size: rows of a step's global batch.
            is_main: whether this process writes caches.
            wait: returns when all processes have called it.
        """
        raise NotImplementedError(type(self))
