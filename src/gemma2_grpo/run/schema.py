"""The records of a run: one model for each file, which writes it and reads it.

A name means the same in all files. Fractions, tokens, seconds and bytes say so in their names, and
`num_` is a count. The records of measurements are in `results.py`; `docs/logs.md` is made from all.
"""

import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.folder import Part, Record

SCHEMA_VERSION = 1
"""Rises when a key is renamed or changes its meaning; a file without it is older than the first."""

# The largest float32. What is above it is damage, and would overflow in sums.
_LARGEST = 3.5e38

_PACKAGES = ("gemma2-grpo-reasoning", "google-tunix", "qwix", "jax", "jaxlib", "flax", "optax")

Numbers = Mapping[str, float]
"""The finite numbers of a record by name."""


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they are written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Nats = Annotated[Number, "nats per token"]


class Versioned(Record):
    """A file that says by which version of this schema it and its neighbours were written."""

    schema_version: int = 0
    """Version of the names and meanings of all logs in this directory."""

    @classmethod
    def check_version(cls, folder: Path, remedy: str) -> None:
        """Refuses a folder whose logs would be misread.

        Args:
            folder: The folder; its file may be missing or damaged, which is no other version.
            remedy: What the user can do about it.

        Raises:
            UserError: if the file was written by another version of the schema.
        """
        file = folder / cls.FILE
        try:
            found = Versioned.model_validate_json(file.read_bytes()).schema_version
        except (OSError, ValueError):
            return
        if found != SCHEMA_VERSION:
            wrote = f"schema version {found}" if found else "an older schema, without a version"
            raise UserError(
                f"{file}: has {wrote}; this gemma2-grpo reads version {SCHEMA_VERSION}; {remedy}"
            )


# --- What was run ---


class Start(Part):
    """One start of a command."""

    started: str = ""
    """Time of the start, in UTC."""
    command: tuple[str, ...] = ()
    """The command line; empty if a notebook or a program started it."""
    machine: str | None = None
    """Operating system and architecture."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and of the main packages."""

    @classmethod
    def now(cls) -> "Start":
        """This start of this command."""
        return Start(
            started=utc_now(),
            command=tuple(_command()),
            machine=platform.platform(),
            versions={"python": platform.python_version(), **installed_versions(_PACKAGES)},
        )


class Data(Part):
    """The problems that were used."""

    source: str = ""
    """`dataset` of the configuration."""
    num_dropped: int = 0
    """Problems left out because their prompts exceed `max_prompt_tokens`."""


class RunFacts(Versioned):
    """Data, model, devices and versions of a run."""

    FILE: ClassVar[str] = "run.json"

    directory: str | None = None
    """Directory at the last start; by it, paths in config.toml are found after a move."""
    devices: tuple[str, ...] = ()
    """Devices of the mesh."""
    data: Data = Data()
    """The training problems."""
    data_sha256: str | None = None
    """Hash of all selected problems; a run is not resumed with others."""
    base_sha256: str | None = None
    """Hash of the base model's weights, taken from samples of its files."""
    reward_sha256: str | None = None
    """Hash of the file of `--reward` and of its imports; null without one."""
    num_adapted_matrices: int | None = None
    """Weight matrices that have an adapter."""
    num_adapted_parameters: int | None = None
    """Parameters of all adapters."""
    starts: tuple[Start, ...] = ()
    """Every start of the run, the first one first."""


class Change(Record):
    """One `--allow-config-change` that took effect."""

    FILE: ClassVar[str] = "changes.jsonl"

    time: str
    """Time of the start, in UTC."""
    changed: list[str]
    """Each difference from what the run was made with, as text."""


class Identity(Record):
    """The id under which trackers know the run."""

    FILE: ClassVar[str] = "trackers.json"

    id: str = ""
    """Id at Weights & Biases and trackio."""
    path: str = ""
    """Directory of the run when the id was drawn; a copy elsewhere gets an id of its own."""


# --- Training ---


class AtStep(Record):
    """A record of a certain time of the training."""

    step: int = Field(ge=0)
    """Training steps that are finished with it; 0 is before the first."""


class StepRecord(AtStep):
    """One training step: a batch of rollouts and its updates.

    A metric that the updates report is written under its own name, even if it is not listed here.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number]  # pyright: ignore[reportIncompatibleVariableOverride]

    FILE: ClassVar[str] = "metrics.jsonl"

    mean_reward: Number = None
    """Mean reward of the completions; null if none has one."""
    solution_nll: Nats = None
    """Mean negative log-likelihood of a token of the worked solutions; null but for supervised
    training."""
    reward_std: Number = None
    """Standard deviation of the rewards over the batch."""
    mean_components: dict[str, Number] = Field(default_factory=dict)
    """Mean of each reward component before its weight, by name; `custom` is the user's own."""
    correct_fraction: Number = None
    """Sampled completions whose answer is right."""
    official_correct_fraction: Number = None
    """Sampled completions whose answer is right by GSM8K's own extraction."""
    true_equations_fraction: Number = None
    """Written equations that hold, over all completions."""
    mean_completion_tokens: Number = None
    """Mean length of the completions."""
    truncated_fraction: Number = None
    """Completions that reached `max_completion_tokens` before they ended."""
    uniform_groups_fraction: Number = None
    """Groups whose rewards are all equal, so that no completion is preferred."""
    num_unscored: int | None = None
    """Completions without a reward, which are not trained on."""
    loss: Number = None
    """Loss of the step's last update."""
    kl: Nats = None
    """Estimate of the KL divergence from the reference model, in the step's last update."""
    sampling_kl: Nats = None
    """KL divergence between the policy that sampled and the policy of the first update."""
    entropy: Nats = None
    """Entropy of the policy in the step's first update."""
    clip_fraction: Number = None
    """Tokens whose ratio was clipped, in the step's last update."""
    max_ratio: Number = None
    """Largest ratio of new to old probability of a token, in the step's last update."""
    grad_norm: Number = None
    """Global gradient norm before clipping, in the step's first update."""
    num_updates: int | None = None
    """Updates of the step; 0 if no completion had anything to teach."""
    num_updates_left_out: int | None = None
    """Updates that were not made because their gradient had no finite norm."""
    learning_rate: Number = None
    """Learning rate of the step's first update."""
    rollout_seconds: Number = None
    """Time spent on sampling."""
    reward_seconds: Number = None
    """Time spent on scoring."""
    update_seconds: Number = None
    """Time spent on updates."""
    tokens_per_second: Annotated[Number, "tokens per second"] = None
    """Completion tokens sampled per second of `rollout_seconds`."""
    seconds_left: Annotated[Number, "seconds"] = None
    """Estimate of the time to the last step."""
    num_compiled_programs: int | None = None
    """XLA programs compiled since the process began."""
    num_cached_programs: int | None = None
    """XLA programs read from the program cache since the process began."""
    compile_seconds: Number = None
    """Time spent on compiling since the process began."""
    memory_bytes: int | None = None
    """Memory in use on the fullest device; absent if the backend does not say, as on a CPU."""
    peak_memory_bytes: int | None = None
    """Most memory in use on the fullest device since the process began."""
    peak_memory_fraction: Number = None
    """`peak_memory_bytes` as a part of the memory that the device gives to programs."""
    peak_memory_bytes_by_device: list[int] | None = None
    """Most memory in use on each device since the process began."""


class ScoredCompletion(Record):
    """A completion with its scores."""

    question: str
    """The problem, without instruction and template."""
    answer: str
    """The right answer."""
    completion: str
    """The text that the model wrote."""
    completion_tokens: Annotated[int, "tokens"]
    """Length, the stop token included."""
    truncated: bool
    """Whether the completion reached `max_completion_tokens` before it ended."""
    reward: Number
    """Weighted sum of the components; null if the user's own reward gave none."""
    components: dict[str, Number]
    """Each reward component before its weight, by name; `custom` is the user's own."""
    correct: bool
    """Whether the answer is right."""
    official_correct: bool
    """Whether the answer is right by GSM8K's own extraction."""
    num_equations: int
    """Distinct equations of the reasoning."""
    num_true_equations: int
    """Equations of the reasoning that hold."""


class RunCompletion(ScoredCompletion, AtStep):
    """One completion: sampled in training, or the greedy answer to a held-out problem."""

    FILE: ClassVar[str] = "completions.jsonl"

    kind: Literal["train", "held_out"]
    """`train` or `held_out`."""


def numbers(record: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """The numbers of a record by name, those of a part of it as `part.name`; none is infinite."""
    found = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and abs(value) <= _LARGEST:
            found[f"{prefix}{name}"] = float(value)
    return found


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _command() -> list[str]:
    """The command line; empty where the words are those of a notebook's kernel or another program.

    The command is installed under its name, and also run as a module.
    """
    program = Path(sys.argv[0])
    is_ours = program.stem == "gemma2-grpo" or program.parts[-2:] == ("gemma2_grpo", "cli.py")
    return ["gemma2-grpo", *sys.argv[1:]] if is_ours else []


def utc_now() -> str:
    """The time now, as files have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
