"""Recipes for a first run: `debug` takes seconds, and `default` trains a small language model in minutes."""

from llmeff.config.recipes.recipe import recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.data import Bpe, Builtin, Bytes, TextData
from llmeff.models import DecoderConfig
from llmeff.optim import AdamW, Cosine


@recipe
def debug() -> RunConfig:
    """Runs each part of the training loop within seconds: a tiny model on a small part of the built-in corpus."""
    return RunConfig(
        name="debug",
        model=DecoderConfig(width=32, num_layers=2, num_heads=2, mlp_width=64),
        data=TextData(source=Builtin(max_bytes=2_000_000), tokenizer=Bytes(), sequence_length=64),
        schedule=Cosine(warmup_steps=5),
        optim=AdamW(lr=5e-3),
        train=TrainConfig(steps=30, batch=4),
        evaluation=EvalConfig(every=15, max_units=4, sample_tokens=32),
        checkpoint=CheckpointConfig(every=15),
        runtime=RuntimeConfig(threads=1),
    )


@recipe
def default() -> RunConfig:
    """Trains a small language model of Python source code in under five minutes on two cores.

    In so little time, a small model with many tokens (Hoffmann et al. 2022) and many small steps works best.
    """
    return RunConfig(
        name="default",
        model=DecoderConfig(width=128, num_layers=4, num_heads=2, mlp_width=352),
        data=TextData(source=Builtin(), tokenizer=Bpe(vocab_size=4096), sequence_length=256),
        schedule=Cosine(warmup_steps=50),
        optim=AdamW(lr=6e-3),
        train=TrainConfig(steps=1300, batch=4),
        evaluation=EvalConfig(every=250, max_units=16),
        checkpoint=CheckpointConfig(every=500),
    )
