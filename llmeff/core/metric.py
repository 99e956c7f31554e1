"""Which way a metric is better."""

from typing import Literal

Direction = Literal["lower", "higher"]
"""Whether a lower or a higher value is better."""
