"""The command line, a module for each command."""

from llmeff.cli.command_line import main as main
