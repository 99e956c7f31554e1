"""Any transformers causal language model, from a folder or the hub, with the forward of `Decoder`."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from llmeff.attention.mixer import MixerConfig
from llmeff.core.config import ConfigError, Flag, Text
from llmeff.core.layout import Layout
from llmeff.core.log import logger
from llmeff.core.parameters import Role
from llmeff.cost.workload import Workload
from llmeff.models.cross_entropy import cross_entropy_of_logits, cross_entropy_sum
from llmeff.models.model import LanguageModelConfig, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# B batch, T sequence, D width, V vocabulary

_CANNOT = (TypeError, ValueError, NotImplementedError)
_OFFSETS = (0, 1, 2)
"""Rows that a table of learned positions may have before the first position's (OPT has two)."""


@dataclass(frozen=True, kw_only=True)
class _Abilities:
    """What is known of a model before its weights are read."""

    kind: str
    """Its class."""
    projects: bool
    """See `HFModel`."""
    recomputes: bool
    """Whether its layers can be run again in backward."""
    num_positions: int | None
    """Tokens of the sequences that it is for, by its config; None: it says nothing."""
    learns_positions: bool
    """Whether these are rows of a table, behind which there is nothing."""


class HFModelConfig(LanguageModelConfig):
    """A causal language model of transformers; safetensors only, and no code from outside transformers."""

    name: Literal["hf"] = "hf"
    path: Text
    """A folder, or a model's id on the hub (`HuggingFaceTB/SmolLM2-135M`)."""
    from_scratch: Flag = False
    """Read the config alone and begin from random weights."""
    mixer: MixerConfig | None = None
    """What attends between the model's own projections in every layer: softmax, sliding, linear or performer (see
    `interface.use`). None: its own attention."""

    def build(self) -> "HFModel":
        """The model in float32; on torch's meta device nothing but its config is read.

        Raises:
            ConfigError: there is no such model, its weights are not complete, it embeds fewer tokens than V, or cannot
                take the mixer.
        """
        network = self._network()
        rows = network.get_input_embeddings().weight.shape[0]
        if self.vocabulary() > rows:
            raise ConfigError(
                f"model.vocab_size is {self.vocab_size}, but {self.path} embeds {rows} tokens: use its own tokenizer"
            )
        return HFModel(network, self.mixer)

    def tokenizer_folder(self) -> Path | None:
        """The model's, if its weights are kept and a tokenizer.json lies beside them."""
        folder = Path(self.path)
        return None if self.from_scratch or not (folder / "tokenizer.json").is_file() else folder

    def chunks_logits(self) -> bool:
        """Only where the logits are a product and nothing else."""
        return self._abilities.projects

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """Of its class and config; of the built model, what only a run tells."""
        able, num_tokens = self._abilities, workload.num_tokens
        limit = num_tokens if able.num_positions is None else able.num_positions
        if built is None:
            if workload.loss_chunk is not None and not able.projects:
                yield (
                    f"task.loss_chunk is {workload.loss_chunk}, but {able.kind} computes its logits in a way of its own, "
                    "which gives them whole: use 'auto' or null"
                )
            if workload.recompute and not able.recomputes:
                yield f"runtime.recompute is true, but {able.kind} of transformers cannot: use false"
            if num_tokens > limit and able.learns_positions:
                yield (
                    f"data.sequence_length is {num_tokens}, but {self.path} learns a vector for each of {limit} positions "
                    "and has no more: use at most so many"
                )
            elif num_tokens > limit:
                logger.warning(
                    "data.sequence_length is %d, but %s is for %d positions: nobody says how it fares beyond",
                    num_tokens,
                    self.path,
                    limit,
                )
            return
        assert isinstance(built, HFModel)
        if workload.packed and not built.separates_documents:
            yield (
                f"data.packing is 'documents', but documents packed in one row would see one another in {able.kind}: use "
                "'plain'"
            )
        if num_tokens > limit and not built.reaches(num_tokens):
            yield f"data.sequence_length is {num_tokens}, but {self.path} has {limit} positions: use at most so many"

    @cached_property
    def _abilities(self) -> _Abilities:
        try:
            with torch.device("meta"):
                model = HFModel(self._network(), self.mixer)
        except RuntimeError as error:  # of torch, where it does not know an operation without numbers
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"model.path: {self.path} cannot be run on shapes, so it has no price ({reason})"
            ) from None
        network = model.network
        limit = getattr(network.config.get_text_config(), "max_position_embeddings", None)
        tables = [module for module in network.modules() if isinstance(module, nn.Embedding)]
        rows = [table.num_embeddings for table in tables if table is not network.get_input_embeddings()]
        return _Abilities(
            kind=type(network).__name__,
            projects=model.projects,
            recomputes=network.supports_gradient_checkpointing,
            num_positions=limit,
            learns_positions=limit is not None and any(count - limit in _OFFSETS for count in rows),
        )

    def _network(self) -> "PreTrainedModel":
        import transformers
        from huggingface_hub.errors import StrictDataclassError

        import llmeff.models.pretrained  # noqa: F401  (enters llmeff's own format into the Auto classes)

        if Path(self.path).is_absolute() and not Path(self.path).is_dir():
            raise ConfigError(f"model.path: there is no folder {self.path}")
        transformers.utils.logging.disable_progress_bar()  # it would draw over the run's own
        models = transformers.AutoModelForCausalLM
        try:
            config = transformers.AutoConfig.from_pretrained(self.path)
            if self.from_scratch or torch.get_default_device().type == "meta":
                return cast("PreTrainedModel", models.from_config(config, dtype=torch.float32))
            network, loaded = models.from_pretrained(
                self.path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model.path: {self.path!r} is neither a folder with a causal language model in safetensors nor one "
                f"that the hub gives now: {reason}"
            ) from None
        if loaded["missing_keys"]:
            raise ConfigError(f"model.path: {self.path} lacks weights: {_some(loaded['missing_keys'])}")
        if loaded["unexpected_keys"]:
            logger.warning(
                "%s: weights that the model does not use: %s",
                self.path,
                _some(loaded["unexpected_keys"]),
            )
        return cast("PreTrainedModel", network)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


class HFModel(nn.Module):
    """Tokens to logits, or to a summed loss.

    What a foreign model can do is found by running it on four tokens, since neither its class nor its config tells.

    Args:
        network: the transformers model; `save_pretrained` and `generate` are its own.
        mixer: what attends in it; None: its own attention.
    """

    def __init__(self, network: "PreTrainedModel", mixer: MixerConfig | None = None):
        super().__init__()
        self.network = network.eval()
        self.projects = _projects(network)
        """Whether the logits are the last states times a matrix and nothing else, as chunked logits must be."""
        if mixer is not None:
            _attend(network, mixer)
        self.separates_documents = _separates_documents(network)
        """Whether positions that begin anew keep packed documents apart."""
        self.train()

    @property
    def recompute(self) -> bool:
        """Keep only each layer's input for backward and run the layer again."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if not self.network.supports_gradient_checkpointing:
            if value:
                raise ConfigError(f"recompute: {type(self.network).__name__} of transformers cannot")
            return
        # the public name of this differs between the releases of transformers 5
        self.network._set_gradient_checkpointing(value, partial(checkpoint, use_reentrant=False))

    def forward(
        self,
        tokens: Tensor,
        layout: Layout | None = None,
        targets: Tensor | None = None,
        loss_chunk: int | None = None,
    ) -> Tensor:
        """Logits, or the summed loss where targets are given.

        Args:
            tokens: (B, T) int64.
            layout: positions and documents; None: one document a row.
            targets: (B, T) int64, the token that follows each, `IGNORED_TOKEN` where it does not count.
            loss_chunk: tokens whose logits live at once; None for all.

        Returns:
            (B, T, V) logits, or the cross-entropy in nats summed over the counted targets, a float32 scalar.

        Raises:
            ConfigError: the layout packs documents, or the logits are wanted in chunks, and the model can't.
        """
        inputs = {"input_ids": tokens, "use_cache": False, **self._placed(layout)}
        if targets is not None and loss_chunk is not None:
            if not self.projects:
                kind = type(self.network).__name__
                raise ConfigError(f"loss_chunk: {kind} computes its logits in a way of its own; give null")
            states = self.network.base_model(**inputs).last_hidden_state
            return cross_entropy_sum(states, self.network.get_output_embeddings().weight, targets, loss_chunk)
        logits: Tensor = self.network(**inputs).logits
        return logits if targets is None else cross_entropy_of_logits(logits, targets)

    def _placed(self, layout: Layout | None) -> dict[str, Tensor]:
        if layout is None:
            return {}
        if layout.documents is None:
            placed = {"position_ids": layout.positions}
            return placed if layout.padding is None else placed | {"attention_mask": layout.padding.long()}
        if not self.separates_documents:
            raise ConfigError(
                f"documents packed in one row would see one another in {type(self.network).__name__}: "
                "pack without document boundaries"
            )
        # Padding is a document of its own, or behind one: a mask would only make transformers overlook the documents.
        return {"position_ids": layout.positions}

    @torch.no_grad()
    def reaches(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens has a place for each, found by running one."""
        try:
            self(torch.zeros(1, num_tokens, dtype=torch.int64, device=self.network.device))
        except (IndexError, RuntimeError):
            return False
        return True

    def roles(self) -> dict[str, Role]:
        """What each parameter is, by name, told by the module that holds it."""
        head = self.network.get_output_embeddings()
        return {
            f"{prefix}.{name}" if prefix else name: "head" if module is head else _role(module, name, parameter)
            for prefix, module in self.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }


def _attend(network: "PreTrainedModel", mixer: MixerConfig) -> None:
    from llmeff.models import interface

    try:
        interface.use(network, mixer)
    except ConfigError as error:
        raise ConfigError(f"model.mixer: {error}") from None


def _role(module: nn.Module, name: str, parameter: Tensor) -> Role:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if name.endswith("bias"):
        return "bias"
    if parameter.dim() < 2:
        return "norm"
    return "conv" if isinstance(module, nn.Conv1d) else "matrix"


def _probe(network: "PreTrainedModel") -> Tensor:
    weight: Tensor = network.get_input_embeddings().weight
    return torch.arange(4, device=weight.device)[None] % weight.shape[0]


def _separates_documents(network: "PreTrainedModel") -> bool:
    """Packs two documents of two tokens and asks whether the second's logits have any gradient in the first's."""
    if network.device.type == "meta":
        return True
    embedded = network.get_input_embeddings()(_probe(network)).detach().requires_grad_()
    positions = torch.tensor([[0, 1, 0, 1]], device=embedded.device)
    try:
        with torch.enable_grad():
            given = embedded.clone()  # some models scale it in place
            logits = network(inputs_embeds=given, position_ids=positions, use_cache=False).logits
            (grad,) = torch.autograd.grad(logits[:, 2:].square().sum(), embedded)
    except _CANNOT:
        return False
    return bool(grad[:, 2:].any() and not grad[:, :2].any())


def _projects(network: "PreTrainedModel") -> bool:
    """Asks whether the output embedding is given the body's states as they are, and the logits are what it makes."""
    body, head = network.base_model, network.get_output_embeddings()
    if not isinstance(head, nn.Linear) or "bias" in dict(head.named_parameters()):
        return False
    tokens = _probe(network)
    with FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else contextlib.nullcontext():
        seen, logits = _run_watched(network, tokens, [*body.modules(), head])
        alone, states = _run_watched(body, tokens, body.modules())
    given, made = seen.get(head, (None, None))
    # some run a part of the body alone: what matters is what that part gives both times
    ends = [part for part, (_, end) in alone.items() if end == states and part in seen]
    return made == logits and any(seen[part][1] == given for part in ends)


_Watched = dict[nn.Module, tuple[object, object]]


@torch.no_grad()
def _run_watched(network: nn.Module, tokens: Tensor, parts: Iterable[nn.Module]) -> tuple[_Watched, object]:
    """Which tensor each part is given and which it makes in a run, and which the run gives."""
    seen: _Watched = {}
    held = []

    def see(part: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        held.append((given, made))  # lest another takes its place in memory
        seen[part] = _identity(given[0] if given else None), _identity(made)

    hooks = [part.register_forward_hook(see) for part in parts]
    try:
        return seen, _identity(network(tokens, use_cache=False))
    finally:
        for hook in hooks:
            hook.remove()


def _identity(made: Any) -> object:
    """Equal for views of the same numbers, unless these changed in between; of an output's logits or last states."""
    tensor = getattr(made, "logits", getattr(made, "last_hidden_state", made))
    if not isinstance(tensor, Tensor):
        return None
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor._version


@save_model.register
def _save_network(model: HFModel, folder: Path, *, max_length: int, end_id: int) -> None:
    # The network's own config says how long its sequences are and how they end.
    model.network.save_pretrained(folder)
