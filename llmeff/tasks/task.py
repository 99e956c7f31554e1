"""The contract of a task: what is trained, on what, towards what, and how well it does."""

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

# Without arguments a task is one of any model and data: the kinds are checked when a run is validated, not by its types.
ModelT = TypeVar("ModelT", bound=ModelConfig, default=Any)
DataT = TypeVar("DataT", bound=DataConfig, default=Any)

ITEMS = "items of the step"
"""Among the names of losses, what `Batch.totals` counts beside them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A share of one step's global batch."""

    inputs: dict[str, Any]
    """What the model's forward takes, by argument name."""
    targets: Any = None
    """What the loss compares with the model's output, where forward does not take it."""
    counts: dict[str, float]
    """What each named loss is divided by, as far as this share adds to it: items, or their weights; known from the data
    alone."""
    items: int
    """Tokens or pixels of this share that a loss is summed over."""

    def totals(self) -> dict[str, float]:
        """What is added up over all shares of a step: what losses are divided by, and the items."""
        return {**self.counts, ITEMS: self.items}


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """One held-out unit's result: a document, an image."""

    unit: str
    """Its id."""
    loss_sum: float
    """Summed over the unit, in nats."""
    count: int
    """What the sum is over (tokens, pixels)."""
    metrics: dict[str, float]
    """More sums over this unit, by name (`bytes`)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Something that a trained model makes, for people to look at."""

    text: str | None = None
    """For the terminal and the result."""
    picture: bytes | None = None
    """A PNG, for the run's folder."""


class Task(ABC, Generic[ModelT]):
    """Joins model, data, loss and metric. What a step trains on is a pure function of (seed, step)."""

    item: str
    """What the loss is a mean over, in the singular (`token`, `pixel`)."""
    items_per_step: int
    """The most that a step's loss is a mean over."""

    @abstractmethod
    def resolve(self, model: ModelT) -> ModelT:
        """The model's config with what only the data knows (a vocabulary's size) filled in.

        Raises:
            ConfigError: the model does not fit the data.
        """

    @abstractmethod
    def parameter_infos(self, model: nn.Module) -> list[ParameterInfo]:
        """The parameters to train."""

    @abstractmethod
    def batch(self, step: int, rows: range, device: torch.device) -> Batch:
        """Rows of the global batch of a step (from 0); any split of the rows gives the same step."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Named sums; the loop divides each once by its global count and adds them up."""

    @abstractmethod
    def unit_ids(self, step: int, rows: range) -> list[str]:
        """The documents or images in rows of a step, for a diagnosis."""

    @abstractmethod
    def evaluate(
        self, model: nn.Module, split: str, max_units: int | None, device: torch.device, world: World
    ) -> Iterator[UnitResult]:
        """The results of a split's units, of at most so many of them; the ranks share the work, and each has them all."""

    @abstractmethod
    def summary(self, results: list[UnitResult]) -> dict[str, float]:
        """The metrics of units taken together (`loss`, `bits_per_byte`)."""

    @abstractmethod
    def check_split(self, split: str) -> None:
        """Refuses a split that nothing fell in.

        Raises:
            ConfigError: with what is in each.
        """

    @abstractmethod
    def references(self, split: str) -> dict[str, float]:
        """What a run's metrics on a split are set beside, made without a model (`gzip_bits_per_byte`)."""

    @abstractmethod
    def sample(self, model: nn.Module, split: str, num_tokens: int, device: torch.device) -> Sample:
        """What people look at when a run has ended: so many tokens of text, or what becomes of a few of a split's units.

        All ranks call it.
        """

    @abstractmethod
    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Writes the trained model and all that is needed to use it, as safetensors and JSON."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the record says of the data: names, sizes, and a `sha256` of all that is read."""


class TaskConfig(Component, Generic[ModelT, DataT], family="task"):
    """What a run trains for.

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
    """The metrics of `Task.summary` that comparisons speak of, and which way each is better. They are compared by their ratios:
    a value that is not positive has none."""

    name: Text
    """The task's name."""

    @classmethod
    def __pydantic_init_subclass__(cls, family: str | None = None, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(family, **kwargs)
        kinds = cls.__pydantic_generic_metadata__["args"]
        if kinds:
            cls.model_kind, cls.data_kind = kinds

    def problems(self, model: ModelConfig, data: DataConfig) -> Iterator[str]:
        """What keeps this task from working with the model and the data: their kinds, then what the task adds."""
        if isinstance(model, self.model_kind):
            yield from self.model_problems(cast(ModelT, model))
        else:
            yield f"task {self.name!r} needs {self.needed_model}; model {model.name!r} is none"
        if not isinstance(data, self.data_kind):
            yield f"task {self.name!r} needs {self.needed_data}; data {data.name!r} is none{self.data_hint}"

    def model_problems(self, model: ModelT) -> Iterator[str]:
        """What keeps this task from working with a model of its kind."""
        yield from ()

    def infer_model(self, model: ModelT, data: DataT) -> ModelT | None:
        """What `Task.resolve` will make of the model's config, told without the data; None: only the data tell."""
        return None

    def items(self, data: DataT) -> int:
        """What the loss is a mean over (tokens, pixels), in one sequence (or image)."""
        raise NotImplementedError(type(self))

    def workload(self, model: ModelT, data: DataT) -> Workload:
        """A step of one sequence (or image), as the laws see it."""
        raise NotImplementedError(type(self))

    def open(self, data: DataT, seed: int, batch_size: int, *, is_main: bool, wait: Callable[[], None]) -> Task[ModelT]:
        """The task over opened data.

        Args:
            data: what to read.
            seed: of the data order.
            batch_size: rows of a step's global batch.
            is_main: whether this process writes caches.
            wait: returns when all processes have called it.
        """
        raise NotImplementedError(type(self))
