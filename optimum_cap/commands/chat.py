"""`optimum-cli cap chat`: ask one model, or two side by side."""

import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from optimum_cap.commands.base import (
    CAPSubcommand,
    Terminated,
    add_general_flags,
    add_hub_flags,
    add_loading_flags,
    check_has_lm_head,
    check_loading_flags,
    loading_options,
)
from optimum_cap.commands.parser import CommandParser
from optimum_cap.text import printable

if TYPE_CHECKING:
    from optimum_cap.generation import Chat, Reply

_HELP = "Ctrl-D ends the conversation, Ctrl-C an answer, and /clear starts a new one."


class ChatCommand(CAPSubcommand):
    """Loads the models, then answers one prompt or prompts typed in a terminal."""

    @staticmethod
    def parse_args(parser: CommandParser) -> None:
        """Declare the flags."""
        parser.describe(
            "MODEL [OTHER]",
            "Send the same messages to one or two models, and see their answers side by side. "
            "Without a terminal, the message is read from standard input.",
            "org/model pruned",
            "pruned --prompt 'What is 7 * 6?'",
            page="sharing",
        )
        parser.add_model("Hub id or folder of a model, dense or pruned")
        add = parser.group("conversation")
        add(
            "other",
            metavar="OTHER",
            nargs="?",
            help="a second model to compare with (default: none)",
        )
        add("-p", "--prompt", help="answer this message, and end (default: ask for messages)")
        add("--system", metavar="TEXT", help="system message (default: none)")
        add(
            "--max-new-tokens",
            type=int,
            default=512,
            metavar="N",
            help="longest answer in tokens (default: 512)",
        )
        add(
            "--temperature",
            type=float,
            default=0.0,
            help="temperature of sampling; 0 takes the most probable tokens (default: 0)",
        )
        add("--seed", type=int, default=0, help="seed of sampling (default: 0)")
        add_loading_flags(parser)
        add_hub_flags(parser)
        add_general_flags(parser)

    def prepare(self) -> list[str]:
        """Check the numbers, and the models by their configs; return the models' names."""
        args = self.args
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
        if args.temperature < 0:
            raise ValueError(f"--temperature must be at least 0, got {args.temperature}")
        if not 0 <= args.seed < 1 << 32:
            raise ValueError(f"--seed must be between 0 and {(1 << 32) - 1}, got {args.seed}")
        if args.prompt is not None and not args.prompt.strip():
            raise ValueError("--prompt is empty: write the message after it")
        if args.json and args.prompt is None and sys.stdin.isatty():
            raise ValueError("--json prints the answers to one message: name it with --prompt")
        check_loading_flags(args)
        names = [args.model] if args.other is None else [args.model, args.other]
        for name in names:
            check_has_lm_head(name, args)
        return names

    def execute(self, prepared: list[str]) -> dict[str, Any] | None:
        """Load the models and answer."""
        args = self.args
        in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        message = args.prompt
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read().strip()
            if not message:
                raise ValueError("there is no message in standard input: pass one with --prompt")
        with ExitStack() as stack:
            chats = {name: self._load(name, stack) for name in prepared}
            if args.json and message is not None:
                replies = {
                    name: dataclasses.asdict(chat.ask(message)) for name, chat in chats.items()
                }
                return {"message": message, "answers": replies}
            if message is not None:
                _answer(chats, message, sys.stdout.isatty())
            else:
                _converse(chats, in_terminal)
        return None

    def _load(self, name: str, stack: ExitStack) -> "Chat":
        from optimum_cap.data import load_tokenizer, usable_tokenizer
        from optimum_cap.generation import Chat
        from optimum_cap.models import float32_on_cpu, load_model

        args = self.args
        model = load_model(name, **loading_options(args)).eval()
        stack.enter_context(float32_on_cpu(model))
        tokenizer = load_tokenizer(
            name,
            revision=args.revision or "main",
            trust_remote_code=args.trust_remote_code,
            token=args.token,
        )
        return Chat(
            model,
            usable_tokenizer(tokenizer),
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            system=args.system,
        )


def _converse(chats: "dict[str, Chat]", in_terminal: bool) -> None:
    """Answer typed messages until there are no more."""
    print(_HELP)
    while True:
        try:
            message = input("\n> ").strip()
        except EOFError:
            print()
            return
        if message == "/clear":
            for chat in chats.values():
                chat.clear()
        elif message:
            try:
                _answer(chats, message, in_terminal)
            except Terminated:
                raise
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
            except ValueError as error:  # concerns only this message, so the conversation continues
                print(printable(str(error)), file=sys.stderr)


def _answer(chats: "dict[str, Chat]", message: str, in_terminal: bool) -> None:
    """Print the answer of each model: side by side in a terminal, else one after the other.

    If one is interrupted, all conversations are as before the message.
    """
    before = {name: chat.messages for name, chat in chats.items()}
    try:
        (_answer_side_by_side if in_terminal else _answer_in_turn)(chats, message)
    except BaseException:
        for name, chat in chats.items():
            chat.messages = before[name]
        raise


def _answer_in_turn(chats: "dict[str, Chat]", message: str) -> None:
    for name, chat in chats.items():
        reply = chat.ask(message)
        if len(chats) > 1:
            print(f"== {printable(name)}")
        print(_shown(reply.text))
        if len(chats) > 1:
            print(f"-- {_summary(reply)}\n")


def _answer_side_by_side(chats: "dict[str, Chat]", message: str) -> None:
    from rich.console import Console
    from rich.live import Live

    texts = dict.fromkeys(chats, "")
    summaries = dict.fromkeys(chats, "")
    console = Console()

    def panels() -> Any:
        return _panels([(name, texts[name], summaries[name]) for name in chats])

    try:
        # Output taller than the terminal cannot be redrawn, so its end is cut off here.
        with Live(panels(), console=console, refresh_per_second=8, transient=True) as live:
            for name, chat in chats.items():

                def show(piece: str, name: str = name) -> None:
                    texts[name] += piece
                    live.update(panels())

                summaries[name] = "answering"
                reply = chat.ask(message, show)
                texts[name], summaries[name] = reply.text, _summary(reply)
    finally:
        console.print(panels())


def _panels(columns: Sequence[tuple[str, str, str]]) -> Any:
    """Return a column for each model, with its name above and a summary below the answer."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(expand=True)
    for _ in columns:
        table.add_column(ratio=1)
    table.add_row(
        *(
            Panel(Text(_shown(text)), title=Text(printable(name)), subtitle=Text(summary))
            for name, text, summary in columns
        )
    )
    return table


def _summary(reply: "Reply") -> str:
    """Return the length of an answer, its speed, and whether it was cut off."""
    rate = reply.tokens / reply.seconds if reply.seconds else 0.0
    cut = "" if reply.finished else ", cut off at the limit"
    return f"{reply.tokens} tokens, {rate:.1f} tokens/s{cut}"


def _shown(text: str) -> str:
    """Return the text of an answer without control characters, which a terminal would obey."""
    lines = text.expandtabs(4).strip().split("\n")
    return "\n".join(printable(line) for line in lines)
