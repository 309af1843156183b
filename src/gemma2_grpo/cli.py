"""The `gemma2-grpo` command.

Parses first and imports heavy libraries after, so that `--help` and mistakes answer at once.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, Union

import tyro
from tyro.conf import subcommand

from gemma2_grpo.cli_errors import UsageError, errors_in_one_line
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
COMMANDS: dict[str, type[Command]] = {
    kind.__name__.lower(): kind
    for kind in (Train, Sft, Score, Evaluate, Ask, Report, Export, Plan, Launch)
}


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
    without_help = [argument for argument in arguments if argument not in ("-h", "--help")]
    help_wanted = len(without_help) < len(arguments)
    try:
        defaults = _defaults(_parse_with_tyro(without_help))
    except UsageError:
        if help_wanted:
            return _parse_with_tyro(arguments)
        raise
    # tyro leaves out of the help what stands before `--help`.
    return _parse_with_tyro([without_help[0], "--help"] if help_wanted else arguments, defaults)


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


def _parse_with_tyro(arguments: Sequence[str], defaults: Command | None = None) -> Command:
    """Parses with the fields of `defaults` as defaults of the command of that type."""
    kinds = []
    for name, kind in COMMANDS.items():
        own = defaults if isinstance(defaults, kind) else tyro.MISSING_NONPROP
        kinds.append(Annotated[kind, subcommand(name, default=own)])
    union: Any = Union[tuple(kinds)]  # noqa: UP007 (of a tuple, there is no other way)
    with errors_in_one_line(arguments[0] if arguments else "", COMMANDS):
        return tyro.cli(
            union,
            args=arguments,
            prog="gemma2-grpo",
            description="Teach Gemma 2 to show its work on word problems.",
            registry=REGISTRY,
        )


if __name__ == "__main__":
    sys.exit(main())
