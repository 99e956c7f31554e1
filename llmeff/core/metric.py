"""Which way a metric is better."""

from typing import Literal

Goal = Literal["lower", "higher"]
"""Whether a smaller or a larger value is better."""
