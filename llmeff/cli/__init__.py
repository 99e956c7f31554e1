from llmeff.cli.command_line import main as main
