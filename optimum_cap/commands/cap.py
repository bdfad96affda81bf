"""`optimum-cli cap`: the parent of the other commands in this folder."""

import importlib.metadata
import platform
from argparse import Action, ArgumentParser
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from optimum_cap.commands.chat import ChatCommand
from optimum_cap.commands.compact import CompactCommand
from optimum_cap.commands.compare import CompareCommand
from optimum_cap.commands.completion import CompletionCommand
from optimum_cap.commands.convert import ConvertCommand
from optimum_cap.commands.estimate import EstimateCommand
from optimum_cap.commands.eval import EvalCommand
from optimum_cap.commands.generate import GenerateCommand
from optimum_cap.commands.inspect import InspectCommand
from optimum_cap.commands.parser import CommandParser
from optimum_cap.commands.prune import PruneCommand
from optimum_cap.commands.push import PushCommand
from optimum_cap.commands.recover import RecoverCommand
from optimum_cap.commands.report import ReportCommand
from optimum_cap.commands.score import ScoreCommand
from optimum_cap.commands.study import StudyCommand


class CAPCommand(BaseOptimumCLICommand):
    """The parent command: prints its help; its subcommands do the work."""

    COMMAND = CommandInfo(name="cap", help="Prune a causal language model and evaluate it.")
    # optimum 2.3 refuses a (child, parent) pair in REGISTER_COMMANDS if the parent is registered
    # by the same list, so the subcommands are declared here.
    SUBCOMMANDS = (
        CommandInfo("prune", "Prune a causal language model.", PruneCommand),
        CommandInfo("generate", "Let a model answer the prompts of a data set.", GenerateCommand),
        CommandInfo("score", "Measure the causal scores of a model.", ScoreCommand),
        CommandInfo("inspect", "Show what was pruned in a checkpoint and how.", InspectCommand),
        CommandInfo("convert", "Rewrite a checkpoint in another format.", ConvertCommand),
        CommandInfo("compact", "Remove what is zero from a model.", CompactCommand),
        CommandInfo("recover", "Train a pruned model to match the dense one.", RecoverCommand),
        CommandInfo("eval", "Measure accuracy and perplexity of a model.", EvalCommand),
        CommandInfo("compare", "Compare pruned models with a dense one.", CompareCommand),
        CommandInfo("chat", "Ask one model, or two side by side.", ChatCommand),
        CommandInfo("report", "Write a page about a checkpoint.", ReportCommand),
        CommandInfo("push", "Upload a pruned checkpoint to the Hub.", PushCommand),
        CommandInfo("estimate", "Estimate the cost of a model or a study.", EstimateCommand),
        CommandInfo("study", "Compare recipes over models, sparsities and seeds.", StudyCommand),
        CommandInfo("completion", "Print a script that completes flags.", CompletionCommand),
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Make this parser and those of the subcommands report errors in one line."""
        # optimum creates the parser and does not allow choosing its class.
        parser.__class__ = CommandParser
        parser.add_argument(
            "--version", action=_ShowVersions, nargs=0, help="show the versions, and exit"
        )


class _ShowVersions(Action):
    """Prints the versions to include in a bug report."""

    def __call__(self, parser: ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        for name in ("optimum-cap", "optimum", "transformers", "torch", "huggingface_hub"):
            print(f"{name:15} {importlib.metadata.version(name)}")
        print(f"{'Python':15} {platform.python_version()} on {platform.platform()}")
        parser.exit()
