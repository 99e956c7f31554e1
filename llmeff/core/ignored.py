"""Labels that a loss ignores."""

IGNORED_TOKEN = -100
"""Label of ignored tokens, as in torch's cross-entropy and transformers."""
IGNORED_PIXEL = 255
"""Label of pixels without a class, as in Cityscapes."""
