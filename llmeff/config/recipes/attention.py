"""Sweeps that compare mixers: how much their states remember, and how well they model text."""

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
    """Returns the fields to set for each mixer, so that every mixer's state has H x H numbers per head.

    This number does not include the sums that normalize a kernel, or the tokens that short convolutions keep.

    Args:
        head_dim: H.
        window: number of tokens in the sliding window. It should be H / 2 or H / 2 + 1, so that the cached keys and
            values are about as large as a state. Decoding caches one token fewer than the window.
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
"""MLP widths are multiples of this."""


def _settings(mixer: Text, fields: Mapping[Text, int]) -> tuple[Text, ...]:
    """Returns the settings that choose a mixer and its fields, in the form of `--set`."""
    return f"model.mixer={mixer}", *(f"model.mixer.{field}={value}" for field, value in fields.items())


def _of_equal_size(base: DecoderConfig, settings: Mapping[Text, tuple[Text, ...]]) -> dict[Text, tuple[Text, ...]]:
    """Adds an MLP width to the settings of each arm, so that all models have nearly as many parameters as the base.

    Args:
        base: the model that all arms start from.
        settings: the settings of each arm, by the arm's name.
    """

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
"""Settings of mixers that learn their decay, for a slow decay at the start of training.

Before training, the median state then keeps 97 % of its values over 64 tokens.
"""


@sweep_recipe
def recall() -> SweepConfig:
    """Compares how much each mixer's state remembers: associative recall (MQAR) of sixteen pairs in 64 tokens.

    All models have nearly equal numbers of parameters. A state has 4 KiB per layer, as do the keys and values in the
    sliding window. A short convolution keeps 2.25 KiB more. Mixers that learn their decay have two arms: one starts
    from the decay of its paper, the other from a slow decay. Learning rates are tuned on a separate seed, with a third
    of the steps. Final runs use three fresh seeds.
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
    """Compares all mixers and a hybrid on text, with nearly equal parameters, four learning rates each and three seeds.

    All arms train on the same number of tokens: less than an epoch of tinyshakespeare, in windows of 128 tokens. The
    command `llmeff context` tests the trained models on longer windows.
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
