"""Marks of what does not count in a loss."""

IGNORED_TOKEN = -100
"""Of a token, as in torch's cross-entropy and transformers."""
IGNORED_PIXEL = 255
"""Of a pixel that nobody labelled, as in Cityscapes."""
