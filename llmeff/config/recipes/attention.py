"""Mixers against one another: what each remembers, and what it makes of text."""

from collections.abc import Mapping

from llmeff.config.recipes.corpus import one_text
from llmeff.config.recipes.recipe import sweep_recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.config.sweep import ArmConfig, Span, SweepConfig, TuningConfig
from llmeff.core.config import Text, override, validate
from llmeff.data import RecallData
from llmeff.models import DecoderConfig
from llmeff.optim import Cosine
from llmeff.tasks import Recall


def _mixers(head_dim: int, window: int) -> dict[Text, dict[Text, int]]:
    """Every mixer, those with a state with one of as many numbers: for each head a square of its width.

    Sums beside a kernel's state, and the tokens of short convolutions, are on top.

    Args:
        head_dim: H.
        window: of which decoding keeps all tokens but one, with about as many keys and values: H / 2 or one more.
    """
    return {
        "softmax": {},
        "sliding": {"window": window},
        "mla": {"latent": 2 * head_dim},
        "linear": {},
        "performer": {"num_features": head_dim},
        "retention": {"value_width": head_dim},
        "gla": {"key_width": head_dim},
        "mamba2": {"state_width": head_dim // 2},
        "deltanet": {},
        "gated-deltanet": {},
        "kda": {},
    }


_STEP = 8
"""Widths of MLPs are multiples of it."""


def _settings(mixer: Text, fields: Mapping[Text, int]) -> tuple[Text, ...]:
    """As `--set` takes them."""
    return f"model.mixer={mixer}", *(f"model.mixer.{field}={value}" for field, value in fields.items())


def _of_equal_size(base: DecoderConfig, settings: Mapping[Text, tuple[Text, ...]]) -> dict[Text, tuple[Text, ...]]:
    """Models with as many parameters as the base has, as nearly as the width of their MLPs can make them."""

    def num_parameters(own: tuple[Text, ...], width: int) -> int:
        tree = {"model": base.model_dump(mode="json") | {"vocab_size": 1, "mlp_width": width}}
        return sum(weight.size for weight in validate(DecoderConfig, override(tree, own)["model"]).weights())

    found = {}
    for name, own in settings.items():
        a_step = num_parameters(own, 2 * _STEP) - (least := num_parameters(own, _STEP))
        missing = num_parameters((), base.layer_mlp_width(0)) - least
        found[name] = (*own, f"model.mlp_width={_STEP * (1 + max(0, round(missing / a_step)))}")
    return found


_SLOW_RATES = ("model.mixer.initial_rates=[0.01, 0.1]",)
_SLOW: dict[Text, tuple[Text, ...]] = {
    "gla": ("model.mixer.initial_bias=5.0",),
    "mamba2": _SLOW_RATES,
    "gated-deltanet": _SLOW_RATES,
    "kda": _SLOW_RATES,
}
"""Mixers that learn how fast to forget, so that untrained ones keep, in the median, 97 % of a state over 64 tokens."""


@sweep_recipe
def recall() -> SweepConfig:
    """What the state of every mixer remembers: sixteen pairs in 64 tokens (MQAR), equal parameters, three fresh seeds.

    States are of equal size where there is one, 4 KiB a layer, and a window's keys and values too; what a short convolution
    keeps, 2.25 KiB, is on top. Mixers that learn how fast to forget are there twice: with the decays that their papers begin
    with, and with slow ones. The learning rate is chosen on another seed, in a third of the steps.
    """
    head_dim = 16
    arms = {name: _settings(name, own) for name, own in _mixers(head_dim, window=head_dim // 2 + 1).items()}
    arms |= {f"{name}, slow decay": (*arms[name], *slow) for name, slow in _SLOW.items()}
    model = DecoderConfig(width=4 * head_dim, num_layers=2, num_heads=4, mlp_width=128)
    return SweepConfig(
        name="recall",
        base=RunConfig(
            task=Recall(),
            model=model,
            data=RecallData(vocab_size=256, sequence_length=64, pairs=16, held_out=256, seed=1),
            schedule=Cosine(warmup_steps=400),
            train=TrainConfig(steps=7200, batch=16, micro_batch=16),
            evaluation=EvalConfig(split="test", every=0.125, max_units=None, sample_tokens=0),
            checkpoint=CheckpointConfig(every=0),
            runtime=RuntimeConfig(threads=1),
        ),
        arms={
            name: ArmConfig(settings=settings, search={"optim.lr": (4e-3, 8e-3)})
            for name, settings in _of_equal_size(model, arms).items()
        },
        baseline="softmax",
        metric="accuracy",
        tuning=TuningConfig(trials=2, steps=2400),
        seeds=(20, 21, 22),
    )


@sweep_recipe
def attention() -> SweepConfig:
    """Every mixer, and a hybrid, on text: equal parameters and tokens, four learning rates each, three fresh seeds.

    Less than an epoch of tinyshakespeare, in windows of 128 tokens. `llmeff context` reads the same models in longer ones.
    """
    head_dim = 32
    model = DecoderConfig(width=3 * head_dim, num_layers=2, num_heads=3, mlp_width=256)
    own = {name: _settings(name, fields) for name, fields in _mixers(head_dim, window=head_dim // 2).items()}
    own["gated-deltanet + softmax"] = ("model.pattern=gated-deltanet+softmax",)
    return SweepConfig(
        name="attention",
        base=RunConfig(
            model=model,
            data=one_text(validation=0.1, search=0.05, sequence_length=128),
            schedule=Cosine(warmup_steps=30),
            train=TrainConfig(batch=16, micro_batch=16),
            evaluation=EvalConfig(every=0.125, max_units=None, sample_tokens=0),
            checkpoint=CheckpointConfig(every=0),
            runtime=RuntimeConfig(threads=1),
        ),
        arms={
            name: ArmConfig(settings=settings, search={"optim.lr": Span(low=2e-3, high=3.2e-2)})
            for name, settings in _of_equal_size(model, own).items()
        },
        baseline="softmax",
        budget=300 * 16 * 128,
        tuning=TuningConfig(trials=4),
        seeds=(0, 1, 2),
    )
