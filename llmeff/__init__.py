"""llmeff: a distributed training harness and laboratory for the efficiency of large language models."""

__version__ = "0.1.0"
