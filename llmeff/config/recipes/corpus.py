"""The corpus that the studies share: one text file of the user, cut into splits in order."""

from llmeff.data import Characters, SplitConfig, TextData, TextFiles, TokenizerConfig


def one_text(
    *,
    validation: float,
    search: float = 0.0,
    test: float = 0.0,
    tokenizer: TokenizerConfig | None = None,
    sequence_length: int = 64,
) -> TextData:
    """Returns the data config for `input.txt` in the working folder, cut into windows of tokens.

    The first part of the file is for training, and the last part is held out. Our studies used tinyshakespeare. To read
    another file in a sweep, use `--set 'base.data.source.path=["mine.txt"]'`.

    Args:
        validation: share of the validation split.
        search: share of the search split.
        test: share of the test split.
        tokenizer: the tokenizer. None means that every character is a token.
        sequence_length: tokens in a window.
    """
    return TextData(
        source=TextFiles(path=("input.txt",)),
        tokenizer=tokenizer or Characters(),
        splits=SplitConfig(by="span", validation=validation, test=test, search=search, calibration=0.0),
        sequence_length=sequence_length,
    )
