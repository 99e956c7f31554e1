"""Entry point of `python -m llmeff.cli`."""

import sys

from llmeff.cli.command_line import main

if __name__ == "__main__":
    sys.exit(main())
