"""LoRA: frozen weights plus trained low-rank updates (Hu et al. 2022), implemented by the peft library."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from llmeff.core.config import ConfigError, Count, Flag, Positive, Text
from llmeff.core.registry import nearest
from llmeff.models.transform import TransformConfig


class LoRA(TransformConfig):
    """Linear layers compute W x + (alpha / rank) B A x. Only A and B are trained. Saving adds the update to W."""

    name: Literal["lora"] = "lora"
    rank: Count = 8
    """Rank of the update."""
    alpha: Positive = 16.0
    """Scale of the update, which is multiplied by alpha / rank."""
    targets: tuple[Text, ...] = ()
    """Linear layers to update, by the ends of their names (`q_proj`). If empty, all except the output embedding."""
    rank_stabilized: Flag = False
    """Multiply the update by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023)."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Freezes the model's weights, and adds trainable updates to the chosen layers.

        Raises:
            ConfigError: peft is not installed, or a target matches no linear layer.
        """
        try:
            import peft
        except ImportError:
            raise ConfigError('transform "lora" needs peft: pip install "llmeff[peft]"') from None

        chosen = list(self._chosen(model))
        settings = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=chosen, use_rslora=self.rank_stabilized
        )
        changed: nn.Module = peft.inject_adapter_in_model(settings, model)
        return changed

    def _chosen(self, model: nn.Module) -> Iterator[str]:
        roles: dict[str, str] = model.roles()  # type: ignore[operator]  # a method of every language model
        linear = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and roles.get(f"{name}.weight", "head") not in ("head", "embedding")
        ]
        ends = {name.rpartition(".")[2] for name in linear}
        for target in self.targets:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                raise ConfigError(f"transforms: lora: no linear layer is called {target!r}.{nearest(target, ends)}")
        for name in linear:
            if not self.targets or any(name == target or name.endswith(f".{target}") for target in self.targets):
                yield name

    def fold(self, model: nn.Module) -> nn.Module:
        """Adds the updates to the weights, restores the original layers and unfreezes all parameters."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers: list[tuple[str, Any]] = [
            (name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
        ]
        for name, layer in layers:
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())
        return model.requires_grad_(True)
