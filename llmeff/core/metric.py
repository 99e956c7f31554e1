"""The direction in which a metric improves."""

from typing import Literal

Direction = Literal["lower", "higher"]
"""Whether lower or higher values of a metric are better."""
