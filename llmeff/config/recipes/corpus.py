"""The common corpus of the studies: one text file of the user's, cut in order."""

from llmeff.data import Characters, SplitConfig, TextData, TextFiles, TokenizerConfig


def one_text(
    *,
    validation: float,
    search: float = 0.0,
    test: float = 0.0,
    tokenizer: TokenizerConfig | None = None,
    sequence_length: int = 64,
) -> TextData:
    """Windows of `input.txt` in the working folder; the first part is trained on, the last is held out.

    The studies used tinyshakespeare; `--set 'base.data.source.path=["mine.txt"]'` reads another file.
    """
    return TextData(
        source=TextFiles(path=("input.txt",)),
        tokenizer=tokenizer or Characters(),
        splits=SplitConfig(by="span", validation=validation, test=test, search=search, calibration=0.0),
        sequence_length=sequence_length,
    )
