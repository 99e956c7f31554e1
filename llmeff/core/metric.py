"""Whether a metric is better when it is lower or higher."""

from typing import Literal

Direction = Literal["lower", "higher"]
"""Which values of a metric are better."""
