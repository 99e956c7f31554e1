"""A sweep that compares optimizers with AdamW. Each is tuned with the same budget."""

from llmeff.config.recipes.corpus import one_text
from llmeff.config.recipes.recipe import sweep_recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.config.sweep import ArmConfig, Span, SweepConfig, TuningConfig
from llmeff.models import DecoderConfig
from llmeff.optim import Cosine

ADAMW_RATES, MUON_RATES = Span(low=5e-4, high=3e-2), Span(low=1e-3, high=6e-2)
LION_RATES, SGD_RATES = Span(low=1e-4, high=6e-3), Span(low=3e-2, high=3.0)
"""Learning rates to search. High is 60 times low, except for SGD (100 times), whose best rate is less known."""

OPTIMIZERS = {
    "adamw": ArmConfig(settings=("optim=adamw",), search={"optim.lr": ADAMW_RATES}),
    "adamw8bit": ArmConfig(settings=("optim=adamw8bit",), tuned_as="adamw"),
    "lion": ArmConfig(settings=("optim=lion",), search={"optim.lr": LION_RATES}),
    "muon": ArmConfig(settings=("optim=muon",), search={"optim.lr": MUON_RATES}),
    "sgd": ArmConfig(settings=("optim=sgd",), search={"optim.lr": SGD_RATES}),
}
"""The optimizers that the studies compare, as arms that tune the learning rate."""


@sweep_recipe
def optimizers() -> SweepConfig:
    """Compares AdamW, 8-bit AdamW, Lion, Muon and SGD at two batch sizes: five learning rates each, eight fresh seeds.

    8-bit AdamW reuses AdamW's learning rate, because only the storage of the state differs. AdamW, the baseline, has
    eight more seeds, and another eight in an A/A arm.

    Each run trains on less than one epoch of tinyshakespeare, so that no model can memorize the text.
    """
    return SweepConfig(
        name="optimizers",
        base=RunConfig(
            model=DecoderConfig(width=96, num_layers=2, num_heads=3, mlp_width=256),
            data=one_text(validation=0.1, search=0.05),
            schedule=Cosine(warmup_steps=30),
            train=TrainConfig(batch=32, micro_batch="auto"),
            evaluation=EvalConfig(every=0.0625, max_units=None, sample_tokens=0),
            checkpoint=CheckpointConfig(every=0),
            runtime=RuntimeConfig(threads=1),
        ),
        arms=OPTIMIZERS,
        baseline="adamw",
        axes={"train.batch": (8, 32)},
        budget=300 * 32 * 64,
        tuning=TuningConfig(trials=5),
        seeds=tuple(range(8)),
        baseline_seeds=8,
        aa_seeds=8,
    )
