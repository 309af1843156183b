"""The `gemma2-grpo` command.

Parses first and imports heavy libraries after, so that `--help` and mistakes answer at once.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, NoReturn, Union, get_args

import tyro
from tyro.conf import subcommand

from gemma2_grpo.cli_errors import UsageError, errors_in_one_line, no_command
from gemma2_grpo.cli_help import REGISTRY
from gemma2_grpo.commands.ask import Ask
from gemma2_grpo.commands.evaluate import Evaluate
from gemma2_grpo.commands.export import Export
from gemma2_grpo.commands.launch import Launch
from gemma2_grpo.commands.plan import Plan
from gemma2_grpo.commands.report import Report
from gemma2_grpo.commands.score import Score
from gemma2_grpo.commands.sft import Sft
from gemma2_grpo.commands.train import Train
from gemma2_grpo.errors import UserError
from gemma2_grpo.presets import from_mapping, read_toml

_UNICODE = ("utf-8", "utf8", "utf-16", "utf-32")

Command = Train | Sft | Score | Evaluate | Ask | Report | Export | Plan | Launch
COMMANDS: dict[str, type[Command]] = {kind.__name__.lower(): kind for kind in get_args(Command)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status; users' mistakes are one line and 2."""
    _print_anywhere()
    try:
        done = parse(sys.argv[1:] if arguments is None else arguments)()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # The reader, `head` perhaps, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return done if isinstance(done, int) else 0


def _print_anywhere() -> None:
    """Prints a `?` for what an output cannot encode, such as a pipe on Windows."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in _UNICODE:
            stream.reconfigure(errors="replace")


def parse(arguments: Sequence[str]) -> Command:
    """Reads the command line in two passes; the first finds the TOML file with the defaults.

    Raises:
        UserError: for a command line or a TOML file that cannot be understood.
        SystemExit: with status 0, when help was asked for and printed.
    """
    words = [argument for argument in arguments if argument not in ("-h", "--help")]
    help_wanted = len(words) < len(arguments)
    if help_wanted and not words:
        return _print_commands()
    command, *options = words or [""]
    kind = COMMANDS.get(command)
    if kind is None:
        raise UsageError(no_command(command, COMMANDS))
    try:
        defaults = _defaults(_parse_with_tyro(kind, options))
    except UsageError:
        if not help_wanted:
            raise
        defaults = None
    # tyro leaves out of the help what precedes `--help`.
    return _parse_with_tyro(kind, ["--help"] if help_wanted else options, defaults)


def _defaults(command: Command) -> Command | None:
    """The command with the TOML file's values as defaults; None if it takes no file."""
    if not isinstance(command, Train | Sft | Plan | Launch):
        return None
    required = {
        each.name: getattr(command, each.name)
        for each in fields(command)
        if each.default is MISSING and each.default_factory is MISSING
    }
    config = from_mapping(type(command.config), read_toml(command.config_name), command.config_name)
    return type(command)(**required, config=config)  # type: ignore[arg-type]


def _parse_with_tyro(
    kind: type[Command], options: Sequence[str], defaults: Command | None = None
) -> Command:
    """Parses the options of one command."""
    name = kind.__name__.lower()
    own: Any = tyro.MISSING_NONPROP if defaults is None else defaults
    with errors_in_one_line(name, kind):
        return tyro.cli(
            kind, args=options, default=own, prog=f"gemma2-grpo {name}", registry=REGISTRY
        )


def _print_commands() -> NoReturn:
    """Prints the help of all commands together, and exits."""
    commands = tuple(Annotated[kind, subcommand(name)] for name, kind in COMMANDS.items())
    union: Any = Union[commands]  # noqa: UP007 (of a tuple, there is no other way)
    text = "Teach Gemma 2 or 3 to show its work on word problems."
    tyro.cli(union, args=["--help"], prog="gemma2-grpo", description=text, registry=REGISTRY)
    raise AssertionError("help exits")


if __name__ == "__main__":
    sys.exit(main())
