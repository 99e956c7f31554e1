"""A sweep that measures how much optimizers memorize of a small corpus, in fp32 and bf16."""

from llmeff.config.recipes.corpus import one_text
from llmeff.config.recipes.optimizers import OPTIMIZERS
from llmeff.config.recipes.recipe import sweep_recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.config.sweep import ArmConfig, SweepConfig, TuningConfig
from llmeff.data import Bpe
from llmeff.models import DecoderConfig
from llmeff.optim import Cosine

EPOCH = 54_839
"""Tokens in the first tenth of tinyshakespeare, with a BPE vocabulary of 512 that was trained on this tenth."""


@sweep_recipe
def overfitting() -> SweepConfig:
    """Trains for eight epochs on a tenth of the text, with AdamW, Muon and SGD in fp32 and in bf16, on nine seeds.

    Learning rates are tuned in fp32, for the lowest held-out loss after all eight epochs, and reused in bf16.
    """
    arms = {}
    for name in ("adamw", "muon", "sgd"):
        arm = OPTIMIZERS[name]
        fp32, bf16 = f"{name}, fp32", f"{name}, bf16"
        arms[fp32] = ArmConfig(settings=arm.settings, search=arm.search)
        arms[bf16] = ArmConfig(settings=(*arm.settings, "precision=bf16"), tuned_as=fp32)
    base = RunConfig(
        model=DecoderConfig(width=64, num_layers=2, num_heads=2, mlp_width=176),
        data=one_text(validation=0.03, search=0.03, test=0.84, tokenizer=Bpe(vocab_size=512)),
        schedule=Cosine(warmup_steps=30),
        train=TrainConfig(batch=16, micro_batch="auto"),
        evaluation=EvalConfig(every=0.125, max_units=None, sample_tokens=0),
        checkpoint=CheckpointConfig(every=0),
        runtime=RuntimeConfig(threads=1),
    )
    return SweepConfig(
        name="overfitting",
        base=base,
        arms=arms,
        baseline="adamw, fp32",
        budget=8 * EPOCH,
        tuning=TuningConfig(trials=4),
        seeds=tuple(range(9)),
    )
