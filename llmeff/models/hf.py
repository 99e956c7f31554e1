"""Any causal language model of transformers, loaded from a folder or the Hugging Face Hub, used like `Decoder`."""

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
"""Numbers of extra rows that a table of learned positions may have before the first position's row. OPT has 2."""


@dataclass(frozen=True, kw_only=True)
class _Abilities:
    """Properties of a transformers model that are found before its weights are read."""

    kind: str
    """Name of the model's class."""
    projects: bool
    """Whether the logits are exactly the last states times the output embedding, see `HFModel.projects`."""
    recomputes: bool
    """Whether the model can recompute its layers in the backward pass (gradient checkpointing)."""
    num_positions: int | None
    """Longest sequence in tokens, according to the model's config. None if the config does not state it."""
    learns_positions: bool
    """Whether the positions are rows of a learned table, which makes longer sequences impossible."""


class HFModelConfig(LanguageModelConfig):
    """A causal language model of transformers. Weights are read only from safetensors, and no remote code is run."""

    name: Literal["hf"] = "hf"
    path: Text
    """A local folder, or a model id on the Hugging Face Hub (`HuggingFaceTB/SmolLM2-135M`)."""
    from_scratch: Flag = False
    """Read only the model's config, and initialize its weights randomly."""
    mixer: MixerConfig | None = None
    """The mixer that replaces the model's own attention in every layer, between the model's own projections: softmax,
    sliding, linear or performer, see `interface.use`. None for the model's own attention."""

    def build(self) -> "HFModel":
        """Builds the model in float32. On torch's meta device, reads only the model's config and no weights.

        Raises:
            ConfigError: the model does not exist, lacks weights, has embeddings for fewer tokens than `vocab_size`, or
                does not support the mixer.
        """
        network = self._network()
        rows = network.get_input_embeddings().weight.shape[0]
        if self.vocabulary() > rows:
            raise ConfigError(
                f"model.vocab_size is {self.vocab_size}, but {self.path} embeds only {rows} tokens: use the model's "
                "own tokenizer"
            )
        return HFModel(network, self.mixer)

    def tokenizer_folder(self) -> Path | None:
        """Returns the model's folder if its weights are used and it contains tokenizer.json, otherwise None."""
        folder = Path(self.path)
        return None if self.from_scratch or not (folder / "tokenizer.json").is_file() else folder

    def chunks_logits(self) -> bool:
        """Returns whether the loss can be computed from the logits of a few tokens at a time (`HFModel.projects`)."""
        return self._abilities.projects

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """Yields the reasons why the model cannot be used.

        Without `built`, these are the reasons found from the model's class and config. With it, they are those that
        need the instantiated model.
        """
        able, num_tokens = self._abilities, workload.num_tokens
        limit = num_tokens if able.num_positions is None else able.num_positions
        if built is None:
            if workload.loss_chunk is not None and not able.projects:
                yield (
                    f"task.loss_chunk is {workload.loss_chunk}, but {able.kind} can compute its logits only all at "
                    "once: use 'auto' or null"
                )
            if workload.recompute and not able.recomputes:
                yield f"runtime.recompute is true, but {able.kind} of transformers does not support it: use false"
            if num_tokens > limit and able.learns_positions:
                yield (
                    f"data.sequence_length is {num_tokens}, but {self.path} has learned positions for only {limit} tokens: "
                    f"use at most {limit}"
                )
            elif num_tokens > limit:
                logger.warning(
                    "data.sequence_length is %d, but %s is made for at most %d tokens. Its quality on longer "
                    "sequences is unknown",
                    num_tokens,
                    self.path,
                    limit,
                )
            return
        assert isinstance(built, HFModel)
        if workload.packed and not built.separates_documents:
            yield (f"data.packing is 'documents', but {able.kind} cannot separate the documents of a row: use 'plain'")
        if num_tokens > limit and not built.reaches(num_tokens):
            yield (
                f"data.sequence_length is {num_tokens}, but {self.path} has only {limit} positions: use at most {limit}"
            )

    @cached_property
    def _abilities(self) -> _Abilities:
        try:
            with torch.device("meta"):
                model = HFModel(self._network(), self.mixer)
        except RuntimeError as error:  # torch raises it for operations without a meta kernel
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"model.path: {self.path} cannot be priced, because it does not run on torch's meta device ({reason})"
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

        import llmeff.models.pretrained  # noqa: F401  (registers llmeff's own format with the Auto classes)

        if Path(self.path).is_absolute() and not Path(self.path).is_dir():
            raise ConfigError(f"model.path: the folder {self.path} does not exist")
        transformers.utils.logging.disable_progress_bar()  # it would overwrite the run's progress bar
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
                f"model.path: {self.path!r} is neither a folder with a causal language model in safetensors nor a "
                f"model that can be loaded from the Hugging Face Hub: {reason}"
            ) from None
        if loaded["missing_keys"]:
            raise ConfigError(f"model.path: {self.path} lacks the weights {_some(loaded['missing_keys'])}")
        if loaded["unexpected_keys"]:
            logger.warning(
                "%s: the model does not use these weights: %s",
                self.path,
                _some(loaded["unexpected_keys"]),
            )
        return cast("PreTrainedModel", network)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


class HFModel(nn.Module):
    """A model of transformers that maps tokens to logits or to a summed loss.

    The constructor runs the network on four tokens to find properties that its class and config do not state.

    Args:
        network: the transformers model. It keeps its own `save_pretrained` and `generate`.
        mixer: the mixer that replaces the network's attention. None to keep its own attention.
    """

    def __init__(self, network: "PreTrainedModel", mixer: MixerConfig | None = None):
        super().__init__()
        self.network = network.eval()
        self.projects = _projects(network)
        """Whether the logits are exactly the last states times the output embedding, as chunked logits require."""
        if mixer is not None:
            _attend(network, mixer)
        self.separates_documents = _separates_documents(network)
        """Whether the network separates packed documents if `position_ids` restart at each document."""
        self.train()

    @property
    def recompute(self) -> bool:
        """Whether training saves only each layer's input, and recomputes the layer in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if not self.network.supports_gradient_checkpointing:
            if value:
                raise ConfigError(f"recompute is true, but {type(self.network).__name__} does not support it")
            return
        # the public method has different names in different releases of transformers 5
        self.network._set_gradient_checkpointing(value, partial(checkpoint, use_reentrant=False))

    def forward(
        self,
        tokens: Tensor,
        layout: Layout | None = None,
        targets: Tensor | None = None,
        loss_chunk: int | None = None,
    ) -> Tensor:
        """Returns the logits, or the summed loss if targets are given.

        Args:
            tokens: (B, T) int64.
            layout: positions and documents. None for one document per row.
            targets: (B, T) int64, the next token at each position; `IGNORED_TOKEN` marks targets that do not count.
            loss_chunk: number of tokens whose logits are in memory at the same time. None for all tokens.

        Returns:
            (B, T, V) logits or, if targets are given, the cross-entropy in nats summed over the counted targets, a
            float32 scalar.

        Raises:
            ConfigError: the layout has several documents per row, or `loss_chunk` is a number, but the model does not
                support this.
        """
        inputs = {"input_ids": tokens, "use_cache": False, **self._placed(layout)}
        if targets is not None and loss_chunk is not None:
            if not self.projects:
                kind = type(self.network).__name__
                raise ConfigError(f"loss_chunk must be null, because {kind} can compute its logits only all at once")
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
                f"{type(self.network).__name__} cannot separate the documents of a row: use data.packing 'plain'"
            )
        # Padding is a document of its own, or comes after one. With a mask, transformers would ignore the documents.
        return {"position_ids": layout.positions}

    @torch.no_grad()
    def reaches(self, num_tokens: int) -> bool:
        """Returns whether the model has a position for each of `num_tokens` tokens. Runs the model to find out."""
        try:
            self(torch.zeros(1, num_tokens, dtype=torch.int64, device=self.network.device))
        except (IndexError, RuntimeError):
            return False
        return True

    def roles(self) -> dict[str, Role]:
        """Returns the role of each parameter by name, derived from the module that owns the parameter."""
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
    """Returns whether the logits of the second document in a packed row are independent of the first document.

    On the meta device, this cannot be tested, and the function returns True.
    """
    if network.device.type == "meta":
        return True
    embedded = network.get_input_embeddings()(_probe(network)).detach().requires_grad_()
    positions = torch.tensor([[0, 1, 0, 1]], device=embedded.device)
    try:
        with torch.enable_grad():
            given = embedded.clone()  # some models scale embeddings in place
            logits = network(inputs_embeds=given, position_ids=positions, use_cache=False).logits
            (grad,) = torch.autograd.grad(logits[:, 2:].square().sum(), embedded)
    except _CANNOT:
        return False
    return bool(grad[:, 2:].any() and not grad[:, :2].any())


def _projects(network: "PreTrainedModel") -> bool:
    """Returns whether the network's logits are exactly head(output of the body), without any other operation."""
    body, head = network.base_model, network.get_output_embeddings()
    if not isinstance(head, nn.Linear) or "bias" in dict(head.named_parameters()):
        return False
    tokens = _probe(network)
    with FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else contextlib.nullcontext():
        seen, logits = _run_watched(network, tokens, [*body.modules(), head])
        alone, states = _run_watched(body, tokens, body.modules())
    given, made = seen.get(head, (None, None))
    # some networks call only a part of the body, so compare that part's output in both runs
    ends = [part for part, (_, end) in alone.items() if end == states and part in seen]
    return made == logits and any(seen[part][1] == given for part in ends)


_Watched = dict[nn.Module, tuple[object, object]]


@torch.no_grad()
def _run_watched(network: nn.Module, tokens: Tensor, parts: Iterable[nn.Module]) -> tuple[_Watched, object]:
    """Runs a network. Returns the input and output of each of the parts, and the output of the network.

    Each tensor in the result is replaced by a key that identifies it, see `_identity`.
    """
    seen: _Watched = {}
    held = []

    def see(part: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        held.append((given, made))  # keeps them alive, so that no other tensor reuses their memory
        seen[part] = _identity(given[0] if given else None), _identity(made)

    hooks = [part.register_forward_hook(see) for part in parts]
    try:
        return seen, _identity(network(tokens, use_cache=False))
    finally:
        for hook in hooks:
            hook.remove()


def _identity(made: Any) -> object:
    """Returns a key of a tensor. Two tensors have equal keys if they are the same view of the same, unmodified memory.

    If `made` is a model's output, returns the key of its logits or last states. Returns None if it has no tensor.
    """
    tensor = getattr(made, "logits", getattr(made, "last_hidden_state", made))
    if not isinstance(tensor, Tensor):
        return None
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor._version


@save_model.register
def _save_network(model: HFModel, folder: Path, *, max_length: int, end_id: int) -> None:
    # max_length and end_id are unused: the network's own config has both
    model.network.save_pretrained(folder)
