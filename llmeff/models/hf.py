"""Any causal language model of transformers, from a folder or the hub, with the forward of `Decoder`."""

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
"""How many rows a table of learned positions may have before that of the first position (OPT has two)."""


@dataclass(frozen=True, kw_only=True)
class _Abilities:
    """What is known about a model before its weights are read."""

    kind: str
    """Name of its class."""
    projects: bool
    """Whether its logits are a plain product, see `HFModel.projects`."""
    recomputes: bool
    """Whether its layers can be recomputed in backward."""
    num_positions: int | None
    """Longest sequence in tokens, by its config. None: the config does not tell."""
    learns_positions: bool
    """Whether positions are rows of a learned table, so that longer sequences are impossible."""


class HFModelConfig(LanguageModelConfig):
    """A causal language model of transformers; only safetensors, and no code from outside transformers."""

    name: Literal["hf"] = "hf"
    path: Text
    """A folder, or a model's id on the hub (`HuggingFaceTB/SmolLM2-135M`)."""
    from_scratch: Flag = False
    """Read only the config, and start from random weights."""
    mixer: MixerConfig | None = None
    """The mixer between the model's own projections in every layer: softmax, sliding, linear or performer, see
    `interface.use`. None: the model's own attention."""

    def build(self) -> "HFModel":
        """Builds the model in float32; on torch's meta device only its config is read.

        Raises:
            ConfigError: there is no such model, weights are missing, it embeds fewer than V tokens, or it does not support
                the mixer.
        """
        network = self._network()
        rows = network.get_input_embeddings().weight.shape[0]
        if self.vocabulary() > rows:
            raise ConfigError(
                f"model.vocab_size is {self.vocab_size}, but {self.path} embeds only {rows} tokens: use its own tokenizer"
            )
        return HFModel(network, self.mixer)

    def tokenizer_folder(self) -> Path | None:
        """The model's folder, if its weights are used and it holds a tokenizer.json."""
        folder = Path(self.path)
        return None if self.from_scratch or not (folder / "tokenizer.json").is_file() else folder

    def chunks_logits(self) -> bool:
        """Whether the logits are a plain product, see `HFModel.projects`."""
        return self._abilities.projects

    def problems(self, workload: Workload, built: nn.Module | None = None) -> Iterator[str]:
        """Before building, problems of the class and config; of the built model, those that only a run shows."""
        able, num_tokens = self._abilities, workload.num_tokens
        limit = num_tokens if able.num_positions is None else able.num_positions
        if built is None:
            if workload.loss_chunk is not None and not able.projects:
                yield (
                    f"task.loss_chunk is {workload.loss_chunk}, but {able.kind} computes its logits in its own way, all at "
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
                    "data.sequence_length is %d, but %s is made for %d positions: its quality beyond them is unknown",
                    num_tokens,
                    self.path,
                    limit,
                )
            return
        assert isinstance(built, HFModel)
        if workload.packed and not built.separates_documents:
            yield (f"data.packing is 'documents', but {able.kind} cannot keep documents in one row apart: use 'plain'")
        if num_tokens > limit and not built.reaches(num_tokens):
            yield f"data.sequence_length is {num_tokens}, but {self.path} has {limit} positions: use at most {limit}"

    @cached_property
    def _abilities(self) -> _Abilities:
        try:
            with torch.device("meta"):
                model = HFModel(self._network(), self.mixer)
        except RuntimeError as error:  # from torch, for operations without a meta form
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"model.path: {self.path} cannot be run on shapes alone, so it has no price ({reason})"
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
            raise ConfigError(f"model.path: there is no folder {self.path}")
        transformers.utils.logging.disable_progress_bar()  # it would overwrite the run's own
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
                f"model.path: {self.path!r} is neither a folder with a causal language model in safetensors nor a model "
                f"that can be loaded from the hub: {reason}"
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
    """Maps tokens to logits, or to a summed loss.

    A foreign model's abilities are found by running it on four tokens, since neither its class nor its config tells them.

    Args:
        network: the transformers model, with its own `save_pretrained` and `generate`.
        mixer: the mixer that replaces its attention. None: its own attention.
    """

    def __init__(self, network: "PreTrainedModel", mixer: MixerConfig | None = None):
        super().__init__()
        self.network = network.eval()
        self.projects = _projects(network)
        """Whether the logits are the last states times a matrix and nothing else, as chunked logits require."""
        if mixer is not None:
            _attend(network, mixer)
        self.separates_documents = _separates_documents(network)
        """Whether positions that restart keep packed documents apart."""
        self.train()

    @property
    def recompute(self) -> bool:
        """Save only each layer's input for backward, and recompute the layer."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if not self.network.supports_gradient_checkpointing:
            if value:
                raise ConfigError(f"recompute: {type(self.network).__name__} of transformers does not support it")
            return
        # the public name of this differs between releases of transformers 5
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
            layout: positions and documents; None: one document per row.
            targets: (B, T) int64, the token after each; `IGNORED_TOKEN` if it does not count.
            loss_chunk: tokens whose logits live at once; None: all.

        Returns:
            (B, T, V) logits, or the cross-entropy in nats summed over the counted targets, a float32 scalar.

        Raises:
            ConfigError: the model does not support packed documents, or logits in chunks, but they are requested.
        """
        inputs = {"input_ids": tokens, "use_cache": False, **self._placed(layout)}
        if targets is not None and loss_chunk is not None:
            if not self.projects:
                kind = type(self.network).__name__
                raise ConfigError(f"loss_chunk: {kind} computes its logits in its own way, all at once; give null")
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
                f"{type(self.network).__name__} cannot keep documents in one row apart: pack without document boundaries"
            )
        # Padding is its own document, or follows one. A mask would only make transformers overlook the documents.
        return {"position_ids": layout.positions}

    @torch.no_grad()
    def reaches(self, num_tokens: int) -> bool:
        """Whether the model has a position for each of `num_tokens` tokens, found by running it."""
        try:
            self(torch.zeros(1, num_tokens, dtype=torch.int64, device=self.network.device))
        except (IndexError, RuntimeError):
            return False
        return True

    def roles(self) -> dict[str, Role]:
        """The role of each parameter by name, derived from the module that holds it."""
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
    """Packs two documents of two tokens and tests whether the second's logits depend on the first's tokens."""
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
    """Tests whether the output embedding gets the body's states unchanged, and whether its result is the logits."""
    body, head = network.base_model, network.get_output_embeddings()
    if not isinstance(head, nn.Linear) or "bias" in dict(head.named_parameters()):
        return False
    tokens = _probe(network)
    with FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else contextlib.nullcontext():
        seen, logits = _run_watched(network, tokens, [*body.modules(), head])
        alone, states = _run_watched(body, tokens, body.modules())
    given, made = seen.get(head, (None, None))
    # some models run only a part of the body, so compare what that part returns in both runs
    ends = [part for part, (_, end) in alone.items() if end == states and part in seen]
    return made == logits and any(seen[part][1] == given for part in ends)


_Watched = dict[nn.Module, tuple[object, object]]


@torch.no_grad()
def _run_watched(network: nn.Module, tokens: Tensor, parts: Iterable[nn.Module]) -> tuple[_Watched, object]:
    """Runs a network; returns the identities of each part's input and output, and of the result."""
    seen: _Watched = {}
    held = []

    def see(part: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        held.append((given, made))  # so that no other tensor reuses their memory
        seen[part] = _identity(given[0] if given else None), _identity(made)

    hooks = [part.register_forward_hook(see) for part in parts]
    try:
        return seen, _identity(network(tokens, use_cache=False))
    finally:
        for hook in hooks:
            hook.remove()


def _identity(made: Any) -> object:
    """Identifies a tensor, or an output's logits or last states: equal for views of the same, unmodified numbers."""
    tensor = getattr(made, "logits", getattr(made, "last_hidden_state", made))
    if not isinstance(tensor, Tensor):
        return None
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor._version


@save_model.register
def _save_network(model: HFModel, folder: Path, *, max_length: int, end_id: int) -> None:
    # The network's own config holds its maximum length and its end token.
    model.network.save_pretrained(folder)
