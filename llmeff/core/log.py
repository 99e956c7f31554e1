"""Warnings and diagnoses; what a run prints for people is in the progress display."""

import logging

logger = logging.getLogger("llmeff")


def configure(*, quiet: bool) -> None:
    """Sends llmeff's messages to standard error: warnings and errors, and notices too unless quiet."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("llmeff: %(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
