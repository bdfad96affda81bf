"""The argument parser of the commands, which reports an error in one line, without the usage."""

from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from optimum_cap.text import did_you_mean


class CommandParser(ArgumentParser):
    """Reports errors in one line, and suggests the nearest flag for an unknown one.

    A flag that is required or that takes several values may be given once; of other flags, the last
    one counts, as usual.
    """

    # The destination of each flag; `None` for the parent command, which has none of its own.
    flags: dict[str, str] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.flags = {}
        super().__init__(*args, **kwargs)
        self.register("action", None, _StoreOnce)

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        action = super().add_argument(*args, **kwargs)
        if self.flags is not None:
            self.flags.update(dict.fromkeys(action.option_strings, action.dest))
        return action

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        self.given: set[str] = set()
        for text in args or () if self.flags else ():
            if text == "--":
                break
            if self._is_unknown_flag(text):
                self.error(f"{self._unknown(text)}: {self.prog} --help lists the flags")
        known, rest = super().parse_known_args(args, namespace)
        if rest and self.flags:
            self.error(f"unexpected argument {rest[0]!r}: {self.prog} --help lists the arguments")
        return known, rest

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
        destination = name.lstrip("-").replace("-", "_")
        for flag, dest in flags.items():  # a field of CAPConfig whose flag has another name
            if dest == destination:
                return f"unknown flag {name} (did you mean {flag!r}?)"
        return f"unknown flag {name}{did_you_mean('--' + name.lstrip('-'), flags)}"

    def _check_value(self, action: Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            raise ArgumentError(
                action,
                f"invalid choice: {value!r}{did_you_mean(value, choices)}: choose from "
                f"{', '.join(choices)}",
            )


class _StoreOnce(Action):
    """Store the value of a flag; refuse to replace one that the user meant to be used."""

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
