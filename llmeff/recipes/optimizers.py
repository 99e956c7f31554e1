"""Optimizers against AdamW, each tuned with the same budget."""

from llmeff.data import Characters, SplitConfig, TextData, TextFiles
from llmeff.models import DecoderConfig
from llmeff.optim import AdamW, Cosine
from llmeff.recipes.recipe import sweep_recipe
from llmeff.runconfig import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.sweepconfig import ArmConfig, Span, SweepConfig, TuningConfig


@sweep_recipe
def optimizers() -> SweepConfig:
    """AdamW, its 8-bit form, Lion, Muon and SGD: five learning rates each, three fresh seeds, two batch sizes.

    Give the corpus: `--set 'base.data.source.path=["input.txt"]'` (tinyshakespeare).
    """
    return SweepConfig(
        name="optimizers",
        base=RunConfig(
            model=DecoderConfig(width=96, num_layers=2, num_heads=3, mlp_width=256),
            data=TextData(
                source=TextFiles(path=("input.txt",)),
                tokenizer=Characters(),
                splits=SplitConfig(by="span", validation=0.1, test=0.0, search=0.05, calibration=0.0),
                sequence_length=64,
            ),
            optim=AdamW(),
            schedule=Cosine(warmup_steps=30),
            train=TrainConfig(batch=32, micro_batch="auto"),
            evaluation=EvalConfig(every=0.0625, max_units=None, sample_tokens=0),
            checkpoint=CheckpointConfig(every=0),
            runtime=RuntimeConfig(threads=1),
        ),
        arms={
            "adamw": ArmConfig(settings=("optim=adamw",), search={"optim.lr": Span(low=5e-4, high=3e-2)}),
            "adamw8bit": ArmConfig(settings=("optim=adamw8bit",), search={"optim.lr": Span(low=5e-4, high=3e-2)}),
            "lion": ArmConfig(settings=("optim=lion",), search={"optim.lr": Span(low=1e-4, high=6e-3)}),
            "muon": ArmConfig(settings=("optim=muon",), search={"optim.lr": Span(low=5e-4, high=3e-2)}),
            "sgd": ArmConfig(settings=("optim=sgd",), search={"optim.lr": Span(low=3e-2, high=3.0)}),
        },
        baseline="adamw",
        axes={"train.batch": (8, 32)},
        items=300 * 32 * 64,
        tuning=TuningConfig(trials=5),
        seeds=(0, 1, 2),
    )
