"""The yardstick: a run on the characters of Shakespeare, to compare with nanoGPT's documented run on a CPU."""

from llmeff.config.recipes.corpus import one_text
from llmeff.config.recipes.recipe import recipe
from llmeff.config.run import CheckpointConfig, EvalConfig, RunConfig, RuntimeConfig, TrainConfig
from llmeff.models import DecoderConfig
from llmeff.optim import AdamW, Cosine


@recipe
def yardstick() -> RunConfig:
    """Trains on the data of nanoGPT's CPU run, with the same steps and batch and about the same number of parameters.

    NanoGPT's model has 804,096 parameters, reads 12 x 64 characters per step and reaches 1.8857 nats in 2,000 steps.

    Give the corpus with `--set 'data.source.path=["input.txt"]'` (tinyshakespeare). As in nanoGPT, the first nine
    tenths are for training and the last tenth is held out.

    One wide layer spends a larger share of a step in matrix products than several narrow layers do. Two heads, together
    only half as wide as the model, leave more parameters for the MLP. Untied embeddings take almost no time to look up.
    """
    return RunConfig(
        name="yardstick",
        model=DecoderConfig(
            width=256,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=64,
            mlp_width=864,
            tied_embeddings=False,
        ),
        data=one_text(validation=0.1),
        optim=AdamW(lr=4e-3, beta2=0.99),
        schedule=Cosine(warmup_steps=100),
        train=TrainConfig(steps=2000, batch=12),
        evaluation=EvalConfig(every=500, max_units=None, sample_tokens=200),
        checkpoint=CheckpointConfig(every=1000),
        runtime=RuntimeConfig(threads=1, compile="model"),
    )
