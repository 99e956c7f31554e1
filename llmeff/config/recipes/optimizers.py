"""Compares optimizers with AdamW; each is tuned with the same budget."""

from llmeff.config.recipes.corpus import one_text
from llmeff.config.recipes.recipe import sweep_recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.config.sweep import ArmConfig, Span, SweepConfig, TuningConfig
from llmeff.models import DecoderConfig
from llmeff.optim import Cosine

ADAMW_RATES, MUON_RATES = Span(low=5e-4, high=3e-2), Span(low=1e-3, high=6e-2)
LION_RATES, SGD_RATES = Span(low=1e-4, high=6e-3), Span(low=3e-2, high=3.0)
"""Learning rates to search. All spans are equally wide, except SGD's, since less is known about its best rate."""

OPTIMIZERS = {
    "adamw": ArmConfig(settings=("optim=adamw",), search={"optim.lr": ADAMW_RATES}),
    "adamw8bit": ArmConfig(settings=("optim=adamw8bit",), tuned_as="adamw"),
    "lion": ArmConfig(settings=("optim=lion",), search={"optim.lr": LION_RATES}),
    "muon": ArmConfig(settings=("optim=muon",), search={"optim.lr": MUON_RATES}),
    "sgd": ArmConfig(settings=("optim=sgd",), search={"optim.lr": SGD_RATES}),
}
"""The optimizers that the studies compare, with their spans of learning rates."""


@sweep_recipe
def optimizers() -> SweepConfig:
    """AdamW, its 8-bit form, Lion, Muon and SGD: five learning rates each, eight fresh seeds, two batch sizes.

    8-bit AdamW reuses AdamW's rate, since only the storage of state differs. AdamW, the baseline, has eight more seeds, and
    another eight as an A/A arm.

    Training takes less than an epoch of tinyshakespeare, so that nothing can be memorized.
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
