"""Any transformers causal language model, from a folder or the hub, with the forward of `Decoder`."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmeff.core.config import ConfigError, Flag, Text
from llmeff.core.layout import Layout
from llmeff.core.log import logger
from llmeff.core.table import Role
from llmeff.models.cross_entropy import cross_entropy_of_logits, cross_entropy_sum
from llmeff.models.model import LanguageModelConfig, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# B batch, T sequence, D width, V vocabulary

_CANNOT = (TypeError, ValueError, NotImplementedError)


class HFModelConfig(LanguageModelConfig):
    """A causal language model of transformers; safetensors only, and no code from outside transformers."""

    name: Literal["hf"] = "hf"
    path: Text
    """A folder, or a model's id on the hub (`HuggingFaceTB/SmolLM2-135M`)."""
    from_scratch: Flag = False
    """Read the config alone and begin from random weights."""

    def build(self) -> "HFModel":
        """The model in float32; on torch's meta device nothing but its config is read.

        Raises:
            ConfigError: there is no such model, its weights are not complete, or it embeds fewer tokens than V.
        """
        network = self._network()
        rows = network.get_input_embeddings().weight.shape[0]
        if self.vocabulary() > rows:
            raise ConfigError(
                f"model.vocab_size is {self.vocab_size}, but {self.path} embeds {rows} tokens: use its own tokenizer"
            )
        return HFModel(network)

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
    """

    def __init__(self, network: "PreTrainedModel"):
        super().__init__()
        self.network = network.eval()
        self.separates_documents = _separates_documents(network)
        """Whether positions that begin anew keep packed documents apart."""
        self.projects = _projects(network)
        """Whether the logits are the last states times a matrix and nothing else, as chunked logits must be."""
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
            targets: (B, T) int64, the token that follows each, `IGNORED` where it does not count.
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

    def roles(self) -> dict[str, Role]:
        """What each parameter is, by name, told by the module that holds it."""
        head = self.network.get_output_embeddings()
        return {
            f"{prefix}.{name}" if prefix else name: "head" if module is head else _role(module, name, parameter)
            for prefix, module in self.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        }


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
            logits = network(inputs_embeds=embedded, position_ids=positions, use_cache=False).logits
            (grad,) = torch.autograd.grad(logits[:, 2:].square().sum(), embedded)
    except _CANNOT:
        return False
    return bool(grad[:, 2:].any() and not grad[:, :2].any())


@torch.no_grad()
def _projects(network: "PreTrainedModel") -> bool:
    head = network.get_output_embeddings()
    if network.device.type == "meta":
        return True
    if not isinstance(head, nn.Linear):
        return False
    tokens = _probe(network)
    states: Any = getattr(network.base_model(tokens, use_cache=False), "last_hidden_state", None)
    return states is not None and torch.equal(F.linear(states, head.weight), network(tokens, use_cache=False).logits)


@save_model.register
def _save_network(model: HFModel, folder: Path, *, max_length: int, end_id: int) -> None:
    # The network's own config says how long its sequences are and how they end.
    model.network.save_pretrained(folder)
