"""The argument parser of the commands: grouped help, and one-line errors without the usage."""

import textwrap
from argparse import (
    PARSER,
    Action,
    ArgumentError,
    ArgumentParser,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from optimum_cap.text import did_you_mean

DOCUMENTATION = "https://optimum-cap.github.io/optimum-cap/"

# Titles of the groups of flags, shared by all commands.
REQUIRED = "required"
DATA = "data"
OUTPUT = "output"
LOADING = "loading"
RUN = "run"
HUB = "Hub"
GENERAL = "general"

_MODEL_FLAGS = ("-m", "--model")
_NO_MODEL = "the following arguments are required: MODEL"  # argparse's message
_WIDTH = 79

AddArgument = Callable[..., Action]


class CommandParser(ArgumentParser):
    """Reports errors in one line, and suggests the closest flag for an unknown one.

    Flags that are required or take several values may be given only once; for other flags, the last
    one counts, as usual. The model may be the first argument or the value of `-m`.
    """

    # The destination of each flag; `None` for the parent command, which has no flags of its own.
    flags: dict[str, str] | None = None
    takes_model = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.flags = {}
        self._groups: dict[str, Any] = {}
        # --help comes last, with the other general flags.
        kwargs |= {"add_help": False, "formatter_class": RawDescriptionHelpFormatter}
        super().__init__(*args, **kwargs)
        self.register("action", None, _StoreOnce)

    def group(self, title: str) -> AddArgument:
        """Return the function that adds arguments to a group that `--help` shows together."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        group = self._groups[title]

        def add(*names: str, **options: Any) -> Action:
            action: Action = group.add_argument(*names, **options)
            if self.flags is not None:
                self.flags.update(dict.fromkeys(action.option_strings, action.dest))
            return action

        return add

    def describe(self, arguments: str, description: str, *examples: str, page: str = "") -> None:
        """Set the text that `--help` shows before and after the flags.

        Args:
            arguments: The required arguments, such as `"MODEL -o DIR"`.
            description: What the command does.
            *examples: Arguments of example commands.
            page: Documentation page about the command, such as `"evaluation"`.
        """
        self.usage = f"%(prog)s {arguments} [options]".replace("  ", " ")
        self.description = textwrap.fill(description, _WIDTH)
        lines = ["examples:", *(f"  {self.prog} {each}" for each in examples), ""]
        address = f"{DOCUMENTATION}{page}/" if page else DOCUMENTATION
        self.epilog = "\n".join([*(lines if examples else []), f"documentation: {address}"])

    def add_model(self, help: str, dest: str = "model") -> None:
        """Add the model as the first argument, which `-m` can replace."""
        self.takes_model = True
        self.group(REQUIRED)(dest, metavar="MODEL", help=f"{help}; or -m MODEL")

    def error(self, message: str) -> NoReturn:
        if message == _NO_MODEL:
            message += (
                " (name it first, or with -m: a flag that takes several values, such as --dataset, "
                "takes what follows it as one of them)"
            )
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        self.given: set[str] = set()
        model, args = self._take_model(list(args or ())) if self.takes_model else (None, args)
        for text in args or () if self.flags else ():
            if text == "--":
                break
            if self._is_unknown_flag(text):
                self.error(f"{self._unknown(text)}: {self.prog} --help lists the flags")
        known, rest = super().parse_known_args(args, namespace)
        if rest and self.flags:
            if model is not None:
                self.error(
                    f"unexpected argument {rest[-1]!r}: the model is given by -m already "
                    f"({model}); {self.prog} --help lists the arguments"
                )
            self.error(f"unexpected argument {rest[0]!r}: {self.prog} --help lists the arguments")
        return known, rest

    def _take_model(self, args: list[str]) -> tuple[str | None, list[str]]:
        """Return the value of `-m`, and the arguments with this value moved to the front.

        An optional positional argument does not work, because argparse treats it as missing if
        flags come before it.
        """
        end = args.index("--") if "--" in args else len(args)
        model, rest = None, []
        position = 0
        while position < end:
            text = args[position]
            name, equals, value = text.partition("=")
            position += 1
            if name in _MODEL_FLAGS and equals:
                pass
            elif name in _MODEL_FLAGS:
                if position == end or (args[position][:1] == "-" and len(args[position]) > 1):
                    self.error("argument -m/--model: expected one argument")
                value = args[position]
                position += 1
            elif name == "-model":
                self.error("unknown flag -model (did you mean '--model'?)")
            elif text[:2] == "-m" and " " not in text:  # the value follows without a space
                value = text[2:]
            else:
                rest.append(text)
                continue
            if not value:
                self.error("argument -m/--model: expected one argument")
            if value[0] == "-" and len(value) > 1:
                self.error(f"the model {value!r} begins with a dash: write ./{value} for a folder")
            if model is not None:
                self.error("argument -m/--model: given twice: give it once")
            model = value
        rest += args[end:]
        return model, rest if model is None else [model, *rest]

    def _is_unknown_flag(self, text: str) -> bool:
        if text[:1] != "-" or len(text) == 1 or " " in text or _is_number(text):
            return False
        if text.startswith("--"):
            name = text.partition("=")[0]
            return not any(flag.startswith(name) for flag in self.flags or ())
        return text[:2] not in (self.flags or ())

    def _unknown(self, text: str) -> str:
        name = text.partition("=")[0]
        flags = {flag: dest for flag, dest in (self.flags or {}).items() if flag.startswith("--")}
        if self.takes_model:
            flags["--model"] = "model"
        destination = name.lstrip("-").replace("-", "_")
        for flag, dest in flags.items():  # a field of CAPConfig whose flag has a different name
            if dest == destination:
                return f"unknown flag {name} (did you mean {flag!r}?)"
        return f"unknown flag {name}{did_you_mean('--' + name.lstrip('-'), flags)}"

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            if action.nargs == PARSER:  # a command
                raise ArgumentError(
                    None,
                    f"unknown command {value!r}{did_you_mean(value, choices)}: choose from "
                    f"{', '.join(choices)}",
                )
            raise ArgumentError(
                action,
                f"invalid choice: {value!r}{did_you_mean(value, choices)}: choose from "
                f"{', '.join(choices)}",
            )


class _StoreOnce(Action):
    """Store the value of a flag; refuse a second value that would silently replace the first."""

    def __call__(
        self,
        parser: ArgumentParser,
        namespace: Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if option_string and (self.required or self.nargs == "+"):
            assert isinstance(parser, CommandParser)
            if self.dest in parser.given:
                advice = " with all its values" if self.nargs == "+" else ""
                raise ArgumentError(self, f"given twice: give it once{advice}")
            parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
