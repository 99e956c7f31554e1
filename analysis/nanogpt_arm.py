"""An arm for `llmeff bench`: nanoGPT's model and optimizer, with the training step of nanoGPT's train.py on a CPU.

The environment variable NANOGPT names a checkout of nanoGPT's public repository. Shape and settings are those of the
CPU command in nanoGPT's README (4 layers, 4 heads, width 128, 12 x 64 characters, no dropout, no compile).
"""

import os
import sys

import numpy as np
import torch

from llmeff.config.run import RunConfig
from llmeff.lab.arms import Tick
from llmeff.run.prepare import prepare, prepare_device

BATCH, LENGTH = 12, 64


def nanogpt(config: RunConfig, tick: Tick) -> None:
    """Runs nanoGPT's steps on the characters of the run's corpus. Uses only corpus and threads of the config."""
    sys.path.insert(0, os.environ["NANOGPT"])
    from model import GPT, GPTConfig

    config, task = prepare(config)
    prepare_device(config)
    stream = task.corpus.stream("train")
    characters = np.asarray(stream.tokens[1:-1], dtype=np.uint16)  # without the end tokens, which nanoGPT does not have
    model = GPT(GPTConfig(block_size=LENGTH, vocab_size=65, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), "cpu")

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(characters) - LENGTH, (BATCH,))
        rows = [torch.from_numpy(characters[start : start + LENGTH + 1].astype(np.int64)) for start in starts]
        tokens = torch.stack(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    tokens, targets = batch()
    while True:
        _, loss = model(tokens, targets)
        tokens, targets = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        tick()
