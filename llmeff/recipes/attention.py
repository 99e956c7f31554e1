"""Mixers against one another: what each remembers, and what it makes of text."""

from collections.abc import Mapping

from llmeff.core.config import Text, override, validate
from llmeff.data import RecallData
from llmeff.models import DecoderConfig
from llmeff.optim import Cosine
from llmeff.recipes.corpus import one_text
from llmeff.recipes.recipe import sweep_recipe
from llmeff.runconfig import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.sweepconfig import ArmConfig, Span, SweepConfig, TuningConfig
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


@sweep_recipe
def recall() -> SweepConfig:
    """What the state of every mixer remembers: sixteen pairs in 64 tokens (MQAR), three fresh seeds.

    States are of equal size where there is one, 4 KiB a layer; a window holds an eighth of the row. The learning rate is
    chosen on one seed, in half of the steps.

    Heads that learn how fast to forget begin slowly. At the rates of their papers, which are drawn for each head, all four
    may forget within a few tokens, and then whether anything is learned is left to the seed; two mixers are shown so too.
    """
    steps, head_dim = 3200, 16
    mixers = _mixers(head_dim, window=head_dim // 2 + 1)
    arms = {name: _settings(name, fields) for name, fields in mixers.items()}
    for name in ("gated-deltanet", "mamba2"):
        arms[f"{name}, usual decay"] = arms[name]
    for name in ("gated-deltanet", "kda", "mamba2"):
        arms[name] += ("model.mixer.initial_rates=[0.01, 0.1]",)
    return SweepConfig(
        name="recall",
        base=RunConfig(
            task=Recall(),
            model=DecoderConfig(width=4 * head_dim, num_layers=2, num_heads=4, mlp_width=128),
            data=RecallData(vocab_size=256, sequence_length=64, pairs=16, held_out=256),
            schedule=Cosine(warmup_steps=steps // 8),
            train=TrainConfig(steps=steps, batch=16, micro_batch=16),
            evaluation=EvalConfig(every=0.125, max_units=None, sample_tokens=0),
            checkpoint=CheckpointConfig(every=0),
            runtime=RuntimeConfig(threads=1),
        ),
        arms={
            name: ArmConfig(settings=settings, search={"optim.lr": (2e-3, 4e-3, 8e-3)})
            for name, settings in arms.items()
        },
        baseline="softmax",
        metric="accuracy",
        tuning=TuningConfig(trials=3, steps=1600),
        seeds=(0, 1, 2),
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
        items=300 * 16 * 128,
        tuning=TuningConfig(trials=4),
        seeds=(0, 1, 2),
    )
