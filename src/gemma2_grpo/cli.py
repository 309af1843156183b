"""The `gemma2-grpo` command.

Parses first and imports heavy libraries after, so that `--help` and mistakes answer at once.
"""

import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_type_hints,
)

import tyro
from tyro import _errors  # Private, but the one way to errors of one line; hence the exact minor.
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg, subcommand
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gemma2_grpo.config import Config, EvaluateConfig, SftConfig, check, check_evaluate, check_sft
from gemma2_grpo.errors import UserError
from gemma2_grpo.launch.machines import Launcher
from gemma2_grpo.presets import from_mapping, read_toml

if TYPE_CHECKING:
    from tyro._arguments import ArgumentDefinition

OLDEST_JAX = (0, 10)
_UNICODE = ("utf-8", "utf8", "utf-16", "utf-32")

T = TypeVar("T")
Sections = Annotated[OmitArgPrefixes[T], arg(name="")]
"""A configuration whose fields are options without a prefix: `--max-steps`."""


class UsageError(UserError):
    """A command line that cannot be understood."""


@dataclass(frozen=True)
class Train:
    """Train with GRPO, and measure before and after."""

    config_name: Annotated[Positional[str], arg(metavar="[CONFIG]")] = "tiny"
    """Name of a preset, or path of a TOML file. The options below override its fields."""
    run: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where the run is written. Giving the same directory again resumes it."""
    allow_config_change: FlagCreatePairsOff[bool] = False
    """Resume although the run was made with another configuration."""
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT|auto")] = None
    """Of several processes: where process 0 is, or `auto` to ask the cluster (Cloud TPU pods)."""
    num_processes: int | None = None
    """How many processes train together; Slurm, Open MPI and GKE say so themselves."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    config: Sections[Config] = field(default_factory=Config)

    def defaults(self) -> "Train":
        """Returns the command as it would be if the values of the TOML file were the defaults."""
        return Train(config=from_mapping(Config, read_toml(self.config_name), self.config_name))

    def __call__(self) -> None:
        """Checks the whole configuration, then trains."""
        from gemma2_grpo.runtime.cluster import find_cluster

        config = check(self.config)
        told = (self.coordinator, self.num_processes, self.process_id)
        cluster = find_cluster(*told, os.environ)
        require_jax()
        from gemma2_grpo.commands.train import train

        train(
            config,
            self.run,
            self.config_name,
            allow_config_change=self.allow_config_change,
            cluster=cluster,
        )


@dataclass(frozen=True)
class Sft:
    """Train on worked solutions, and write a model directory."""

    config_name: Annotated[Positional[str], arg(metavar="CONFIG")]
    """Path of a TOML file, or the preset `sft-tiny`."""
    to: Annotated[Path, arg(metavar="DIR")] = Path("sft-model")
    """Where the model is written."""
    config: Sections[SftConfig] = field(default_factory=SftConfig)

    def defaults(self) -> "Sft":
        """Returns the command as it would be if the values of the TOML file were the defaults."""
        values = read_toml(self.config_name)
        return Sft(self.config_name, config=from_mapping(SftConfig, values, self.config_name))

    def __call__(self) -> None:
        """Checks the whole configuration, then trains."""
        config = check_sft(self.config)
        require_jax()
        from gemma2_grpo.commands.sft import sft

        sft(config, self.to)


@dataclass(frozen=True)
class Score:
    """Score the completions of a JSONL file, without a model."""

    file: Annotated[Positional[Path], arg(metavar="FILE.jsonl")]
    """One JSON object a line, with `completion`, `answer` and optionally `question`."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object a line instead of a table."""

    def defaults(self) -> None:
        """Returns nothing: there is no TOML file."""

    def __call__(self) -> None:
        """Prints the scores."""
        from gemma2_grpo.commands.score import score_file

        score_file(self.file, self.json, Config().rewards)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run or a model on held-out problems, with and without its adapter.

    The same command again goes on where a stopped one was, or shows a finished one.
    """

    source: Annotated[Positional[str], arg(metavar="RUN|MODEL")]
    """A run directory, a directory of a model, a Hugging Face id, `kaggle:HANDLE` or `embedded`."""
    to: Annotated[Path | None, arg(metavar="DIR")] = None
    """Where the results are written. Default: the run directory; for a model evaluations/NAME."""
    json: FlagCreatePairsOff[bool] = False
    """Print evaluation.json on standard output, and nothing else there."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Begin anew where the results of an evaluation are already."""
    config: Sections[EvaluateConfig] = field(default_factory=EvaluateConfig)

    def defaults(self) -> None:
        """Returns nothing: there is no TOML file."""

    def __call__(self) -> None:
        """Checks what is asked, then evaluates."""
        config = check_evaluate(self.config)
        require_jax()
        from gemma2_grpo.commands.evaluate import evaluate

        evaluate(self.source, config, self.to, as_json=self.json, overwrite=self.overwrite)


@dataclass(frozen=True)
class Launch:
    """Print the recipe of a training run for a cluster. Nothing is started."""

    config_name: Annotated[Positional[str], arg(metavar="[CONFIG]")] = "gemma2-2b-v5e8"
    """Name of a preset, or path of a TOML file. The options below override its fields."""
    print: Annotated[Launcher, arg(metavar="TOOL")] = tyro.MISSING
    """Whose recipe: `xpk`, `jobset`, `slurm` or `skypilot`."""
    accelerator: Annotated[str, arg(metavar="NAME")] = "v5e-8"
    """A TPU slice such as `v5e-16`, or the GPUs of one host such as `H100:8`."""
    hosts: Annotated[int | None, arg(metavar="INT")] = None
    """How many hosts, where the accelerator does not say."""
    image: Annotated[str | None, arg(metavar="IMAGE")] = None
    """Container image with this package in it."""
    storage: Annotated[str | None, arg(metavar="PLACE")] = None
    """What outlives the hosts and holds the run: gs://BUCKET, a volume claim, a storage of xpk."""
    cluster: Annotated[str | None, arg(metavar="NAME")] = None
    """Name of the cluster, for xpk."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """Name of the job; by default that of the configuration."""
    run: Annotated[str | None, arg(metavar="DIR")] = None
    """Run directory on the hosts; by default in the storage."""
    config: Sections[Config] = field(default_factory=Config)

    def defaults(self) -> "Launch":
        """Returns the command as it would be if the values of the TOML file were the defaults."""
        values = read_toml(self.config_name)
        return Launch(print=self.print, config=from_mapping(Config, values, self.config_name))

    def __call__(self) -> None:
        """Prints the recipe."""
        from gemma2_grpo.launch.launch import launch

        recipe = launch(
            self.config,
            self.config_name,
            self.print,
            self.accelerator,
            hosts=self.hosts,
            name=self.name,
            run=self.run,
            image=self.image,
            storage=self.storage,
            cluster=self.cluster,
        )
        sys.stdout.write(recipe)


@dataclass(frozen=True)
class Ask:
    """Ask a trained run or any Gemma 2 a question, and see its equations checked."""

    source: Annotated[Positional[str], arg(metavar="RUN|MODEL")]
    """Run directory, model directory, Hugging Face or Kaggle id, or `embedded`."""
    question: Annotated[Positional[str | None], arg(metavar="[QUESTION]")] = None
    """The question, in quotes. Without one, questions are asked for until an empty line."""
    samples: int = 1
    """1 gives the likeliest answer; more are sampled, and vote."""
    compare: FlagCreatePairsOff[bool] = False
    """Show the answer of the base model as well."""
    temperature: float | None = None
    """Of the samples; by default that of the run."""
    max_completion_tokens: int | None = None
    """By default that of the run."""
    seed: int = 0
    """Seed of the samples."""

    def defaults(self) -> None:
        """Returns nothing: there is no TOML file."""

    def __call__(self) -> None:
        """Prints the answers."""
        require_jax()
        from gemma2_grpo.commands.ask import ask

        ask(
            self.source,
            self.question,
            samples=self.samples,
            compare=self.compare,
            temperature=self.temperature,
            max_completion_tokens=self.max_completion_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Report:
    """Write what a run did as one HTML file; training does so itself."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run directory, finished or not."""
    compare: Annotated[Path | None, arg(metavar="RUN2")] = None
    """Put this run beside it, instead of telling all of one."""
    to: Annotated[Path | None, arg(metavar="FILE")] = None
    """The file; by default report.html, or compare.html, in the run directory."""
    png: FlagCreatePairsOff[bool] = False
    """Write the plots as PNG too, into a folder `plots` beside it."""

    def defaults(self) -> None:
        """Returns nothing: there is no TOML file."""

    def __call__(self) -> None:
        """Writes the report."""
        from gemma2_grpo.report.report import write_comparison, write_report

        if self.compare:
            print(write_comparison((self.run, self.compare), self.to, plots=self.png))
        else:
            print(write_report(self.run, self.to, plots=self.png))


@dataclass(frozen=True)
class Export:
    """Write what a run trained, for transformers, PEFT, vLLM and others to load."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run directory, finished or not; of an unfinished one the last checkpoint."""
    to: Annotated[Path, arg(metavar="DIR")]
    """Where it is written; absent or empty."""
    format: Literal["merged", "peft"] = "merged"
    """`merged` is a whole model, `peft` the adapters alone."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type to store; by default that of the base's files, and float32 for adapters."""
    max_shard_gb: float = 5.0
    """Largest size of a file of weights."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Run the export in transformers beside the policy. `auto` does where the extra `oracle` is
    installed, on a CPU with memory for both."""
    push: Annotated[str | None, arg(metavar="OWNER/NAME")] = None
    """Upload it to Hugging Face, as a private repository, after asking."""
    public: FlagCreatePairsOff[bool] = False
    """Let everybody see that repository."""
    yes: FlagCreatePairsOff[bool] = False
    """Upload without asking."""

    def defaults(self) -> None:
        """Returns nothing: there is no TOML file."""

    def __call__(self) -> None:
        """Writes the export."""
        require_jax()
        from gemma2_grpo.export.export import export

        export(
            self.run,
            self.to,
            format=self.format,
            dtype=self.dtype,
            max_shard_gb=self.max_shard_gb,
            verify=self.verify,
            push=self.push,
            public=self.public,
            yes=self.yes,
        )


@dataclass(frozen=True)
class Plan:
    """Find out whether a run fits its chips and its time, without any. Exit status 3: it does not.

    Programs are compiled for the target by its own compiler where that is installed.
    """

    config_name: Annotated[Positional[str], arg(metavar="[CONFIG]")] = "gemma2-2b-v5e8"
    """Name of a preset, or path of a TOML file. The options below override its fields."""
    target: Annotated[str, arg(metavar="NAME")] = "v5e-8"
    """v5e-1, v5e-4, v5e-8, v6e-8, v4-8, v5p-8, cpu; by estimate h100, a100, l4, t4."""
    json: FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of tables."""
    budget: Annotated[float, arg(metavar="HOURS")] = 9.0
    """Hours that the run may take."""
    mean_completion_tokens: int = 200
    """What completions are taken to have on average, for the time."""
    config: Sections[Config] = field(default_factory=Config)

    def defaults(self) -> "Plan":
        """Returns the command as it would be if the values of the TOML file were the defaults."""
        return Plan(config=from_mapping(Config, read_toml(self.config_name), self.config_name))

    def __call__(self) -> int:
        """Prints the plan."""
        config = check(self.config)
        require_jax()
        from gemma2_grpo.plan.plan import plan

        return plan(
            config,
            self.config_name,
            self.target,
            as_json=self.json,
            budget_hours=self.budget,
            mean_completion_tokens=self.mean_completion_tokens,
        )


Command = Train | Sft | Score | Evaluate | Ask | Report | Export | Plan | Launch
COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "sft": Sft,
    "score": Score,
    "evaluate": Evaluate,
    "ask": Ask,
    "report": Report,
    "export": Export,
    "plan": Plan,
    "launch": Launch,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status; users' mistakes are one line and 2."""
    _print_anywhere()
    try:
        status = parse(sys.argv[1:] if arguments is None else arguments)()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # The reader, `head` perhaps, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status or 0


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
        defaults = _parse_with_tyro(without_help).defaults()
    except UsageError:
        if help_wanted:
            return _parse_with_tyro(arguments)
        raise
    # tyro leaves out of the help what stands before `--help`.
    return _parse_with_tyro([without_help[0], "--help"] if help_wanted else arguments, defaults)


def require_jax() -> None:
    """Refuses a JAX that is absent or too old, without importing it.

    Raises:
        UserError: naming the version and the mend.
    """
    wanted = ".".join(map(str, OLDEST_JAX))
    try:
        found = metadata.version("jax")
    except metadata.PackageNotFoundError:
        raise UserError(f"JAX is not installed; pip install 'jax>={wanted}'") from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_JAX:
        raise UserError(f"JAX {found} is too old; pip install 'jax>={wanted}'")


def _parse_with_tyro(arguments: Sequence[str], defaults: Command | None = None) -> Command:
    """Parses with the fields of `defaults` as defaults of the command of that type."""
    kinds = []
    for name, kind in COMMANDS.items():
        own = defaults if isinstance(defaults, kind) else tyro.MISSING_NONPROP
        kinds.append(Annotated[kind, subcommand(name, default=own)])
    union: Any = Union[tuple(kinds)]  # noqa: UP007 (of a tuple, there is no other way)

    def refuse(event: _errors.ParseErrorEvent) -> NoReturn:
        raise UsageError(_explain(event, arguments[0] if arguments else ""))

    with _errors.on_parse_error(refuse):
        return tyro.cli(
            union,
            args=arguments,
            prog="gemma2-grpo",
            description="Teach Gemma 2 to show its work on word problems.",
            registry=_REGISTRY,
        )


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _may_be_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Makes help and errors tell of INT where tyro would of `{None}|INT`."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if len(kinds) != 1 or type(None) not in get_args(info.type):
        return None
    of_value = ConstructorRegistry.get_primitive_spec(
        PrimitiveTypeInfo.make(kinds[0], info.markers)
    )
    if not isinstance(of_value, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        of_value,
        # `None` takes back what a TOML file sets.
        instance_from_str=lambda words: (
            None if words == ["None"] else of_value.instance_from_str(words)
        ),
        is_instance=lambda value: value is None or of_value.is_instance(value),
        str_from_instance=lambda value: (
            ["unset"] if value is None else of_value.str_from_instance(value)
        ),
    )


def _explain(event: _errors.ParseErrorEvent, command: str) -> str:
    """Says in one line, with the mend, what tyro would say in a box."""
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        mend = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(COMMANDS)}"
        return f"{command!r} is no command; {mend}" if command else f"a command is missing; {mend}"
    see = f"see gemma2-grpo {command} --help"
    match event:
        case _errors.MissingArgs(missing_arguments=missing):
            return f"{', '.join(_name(each.arg) for each in missing)} is missing; {see}"
        case _errors.UnrecognizedArgs(tokens=[token, *_]):
            known = _options(COMMANDS[command])
            close = difflib.get_close_matches(token.replace("_", "-"), known, n=1, cutoff=0.75)
            mend = f"did you mean {close[0]}?" if close else see
            return f"{token!r} is not understood by {command}; {mend}"
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
    """Returns what a user calls an argument: `--max-steps`, or `CONFIG`."""
    return str(argument.lowered.metavar if argument.is_positional() else argument.display_name())


def _options(kind: type) -> list[str]:
    """Lists the options that a dataclass gives, those of its sections included."""
    options = []
    for name, hint in get_type_hints(kind).items():
        options += (
            _options(hint)
            if isinstance(hint, type) and is_dataclass(hint)
            else ["--" + name.replace("_", "-")]
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
