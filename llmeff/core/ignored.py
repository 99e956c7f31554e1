"""Labels that do not count in a loss."""

IGNORED_TOKEN = -100
"""Label of an ignored token, as in torch's cross-entropy and transformers."""
IGNORED_PIXEL = 255
"""Label of a pixel that nobody labelled, as in Cityscapes."""
