"""Mistakes on the command line in one line, where tyro would print a box."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, NoReturn, get_type_hints

from tyro import _errors  # Private, but the one way to errors of one line; hence the exact minor.

from gemma2_grpo.errors import UserError

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition


class UsageError(UserError):
    """A command line that cannot be understood."""


@contextmanager
def errors_in_one_line(command: str, kind: type) -> Iterator[None]:
    """Makes tyro raise a `UsageError` while it parses the options of a command.

    Args:
        command: Name of the command.
        kind: The dataclass of its options.
    """

    def refuse(event: _errors.ParseErrorEvent) -> NoReturn:
        raise UsageError(_explain(event, command, kind))

    with _errors.on_parse_error(refuse):
        yield


def no_command(word: str, commands: Iterable[str]) -> str:
    """Says in one line that a word is no command, with the nearest one."""
    close = difflib.get_close_matches(word, commands, n=1)
    fix = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(commands)}"
    return f"{word!r} is no command; {fix}" if word else f"a command is missing; {fix}"


def _explain(event: _errors.ParseErrorEvent, command: str, kind: type) -> str:
    """Says in one line what is wrong, with the fix."""
    see = f"see gemma2-grpo {command} --help"
    match event:
        case _errors.MissingArgs(missing_arguments=missing):
            return f"{', '.join(_name(each.arg) for each in missing)} is missing; {see}"
        case _errors.UnrecognizedArgs(tokens=[token, *_]):
            known = _options(kind)
            close = difflib.get_close_matches(token.replace("_", "-"), known, n=1, cutoff=0.75)
            fix = f"did you mean {close[0]}?" if close else see
            return f"{token!r} is not understood by {command}; {fix}"
        case _errors.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"{_name(argument)} takes one of {', '.join(choices)}, not {value!r}"
        case _errors.BadValue(argument=argument):
            return f"{_name(argument)} takes {argument.lowered.metavar}; a value is missing"
        case _errors.InstantiationFailure(argument=argument, message=message) if argument:
            quoted = re.findall(r"""(['"])(.*?)\1""", message.splitlines()[0])
            given = " ".join(text for _, text in quoted)
            return f"{_name(argument)} takes {argument.lowered.metavar}, not {given!r}"
    return f"the command line is not understood; {see}"


def _name(argument: "ArgumentDefinition") -> str:
    """Name of an argument on the command line: `--max-steps`, or `CONFIG`."""
    return str(argument.lowered.metavar if argument.is_positional() else argument.display_name())


def _options(kind: type) -> list[str]:
    """Options that a dataclass gives, those of its sections included."""
    options = []
    for name, hint in get_type_hints(kind).items():
        options += (
            _options(hint)
            if isinstance(hint, type) and is_dataclass(hint)
            else ["--" + name.replace("_", "-")]
        )
    return options
