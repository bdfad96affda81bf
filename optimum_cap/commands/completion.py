"""`optimum-cli cap completion`: a script that completes the commands and flags in a shell."""

from typing import Any

from optimum_cap.commands.base import CAPSubcommand, add_general_flags
from optimum_cap.commands.parser import REQUIRED, CommandParser

_SHELLS = ("bash", "zsh", "tcsh")


class CompletionCommand(CAPSubcommand):
    """Prints the script that shtab generates for all parsers, including optimum's own commands."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "SHELL",
            "Print a script that completes commands and flags of optimum-cli in a shell. It needs "
            'the package shtab. For bash, add eval "$(optimum-cli cap completion bash)" to '
            "~/.bashrc.",
            "bash",
            page="reference/command_line",
        )
        parser.group(REQUIRED)(
            "shell", metavar="SHELL", choices=_SHELLS, help=f"{', '.join(_SHELLS[:-1])} or tcsh"
        )
        add_general_flags(parser)

    def prepare(self) -> None:
        """Check that shtab is installed."""
        try:
            import shtab  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "completion needs the package `shtab`, which is not installed: run pip install "
                "shtab"
            ) from error

    def execute(self, prepared: None) -> dict[str, Any]:
        """Print the script."""
        import shtab
        from optimum.commands.base import RootOptimumCLICommand
        from optimum.commands.optimum_cli import (
            OPTIMUM_CLI_ROOT_SUBCOMMANDS,
            register_optimum_cli_subcommand,
        )

        from optimum_cap.commands.cap import CAPCommand

        root = RootOptimumCLICommand("optimum-cli")
        for command in (*OPTIMUM_CLI_ROOT_SUBCOMMANDS, CAPCommand):
            register_optimum_cli_subcommand(command, parent_command=root)
        script = shtab.complete(root.parser, shell=self.args.shell)
        self.answer(script)
        return {"script": script}
