"""Directories of runs and evaluations: their logs, and what they were made with."""

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from pathlib import Path

from gemma2_grpo.config import Config, flat
from gemma2_grpo.errors import ConfigError, UserError
from gemma2_grpo.presets import from_mapping, read_toml, to_toml
from gemma2_grpo.run.recorded_paths import is_moved, moved_along, with_absolute_paths
from gemma2_grpo.run.results import (
    BegunEvaluation,
    EvaluatedCompletion,
    Evaluation,
    Measurement,
    RunResult,
    System,
)
from gemma2_grpo.run.schema import (
    SCHEMA_VERSION,
    AtStep,
    Change,
    RunCompletion,
    RunFacts,
    Start,
    StepRecord,
    utc_now,
)
from gemma2_grpo.runtime.folder import LockedFolder
from gemma2_grpo.task.jsonl import whole_bytes
from gemma2_grpo.task.statistics import Paired

# Fields of [run] that change nothing that is computed.
_FREE_FIELDS = (
    "checkpoint_every_steps",
    "compilation_cache",
    "eval_every_steps",
    "keep_checkpoints",
    "sample_every_steps",
    "tensorboard",
    "trackio",
    "wandb",
)
_CHOOSE_TO = "choose another --to, or start over with --overwrite"


class RunDirectory(LockedFolder):
    """A run on disk."""

    def __init__(
        self,
        path: Path,
        config: Config,
        *,
        allow_config_change: bool = False,
        writes: bool = True,
    ) -> None:
        """Opens a new or an existing run directory.

        Args:
            path: The directory.
            config: The configuration of the run.
            allow_config_change: Accept an existing run with another configuration.
            writes: Whether this process reads and writes it; see `LockedFolder`.

        Raises:
            UserError: if it cannot be written, is in use, or belongs to another configuration or
                an older version of this package.
        """
        if writes:
            RunFacts.check_version(path, "choose another --run")
        super().__init__(path, kind="run directory", option="--run", writes=writes)
        self._config = config
        self._allow_config_change = allow_config_change
        self._changed = self._changed_fields(config) if writes else []
        self._refuse_changes()

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def result(self) -> RunResult | None:
        """Result of a finished run; None while it is not finished."""
        return self.read(RunResult)

    def _changed_fields(self, config: Config) -> list[str]:
        """Fields whose value differs from the one the run was made with, as text."""
        if not (self.path / "config.toml").exists():
            return []
        now = flat(config)
        return [
            f"{name} = {old!r}, not {now[name]!r}"
            for name, old in flat(with_absolute_paths(read_config(self.path))).items()
            if name not in _FREE_FIELDS and old != now[name]
        ]

    def check_same(self, name: str, sha256: str | None) -> None:
        """Refuses data, weights or code that are not those that the run was made with.

        Args:
            name: A field of run.json.
            sha256: Its value now.

        Raises:
            ConfigError: if another value was recorded.
        """
        recorded = self.read(RunFacts) or RunFacts()
        before = getattr(recorded, name)
        if name in recorded.model_fields_set and before != sha256:
            self._changed.append(f"{name} = {before}, not {sha256}")
            self._refuse_changes()

    def _refuse_changes(self) -> None:
        if self._changed and not self._allow_config_change:
            self.close()
            raise ConfigError(
                f"run directory {self.path} was made with {self._changed[0]}; choose another "
                "--run, or resume with --allow-config-change"
            )

    def describe(self, facts: RunFacts) -> None:
        """Writes what the run is made with, once it is known that it can start.

        That is config.toml and run.json; changes.jsonl if an earlier run in this directory was
        made with something else.

        Args:
            facts: What is known; the version, the directory and every start are added.
        """
        self.write_text("config.toml", to_toml(self._config))
        if self._changed:
            self.append(Change(time=utc_now(), changed=self._changed))
        recorded = self.read(RunFacts) or RunFacts()
        added = {
            "schema_version": SCHEMA_VERSION,
            "directory": str(self.path.resolve()),
            "starts": (*recorded.starts, Start.now()),
        }
        self.write(facts.model_copy(update=added))

    def forget_after(self, steps: int) -> None:
        """Cuts off the records of what a resumed run does again: steps, and a half measurement.

        Records are in the order of their steps, and completions come before their measurement: so
        all that is done again is the end of a log. What precedes the last record that is kept is
        not touched, damaged or not.
        """
        measured = {record.step for record in self.records(Measurement)}

        def is_done_again(record: AtStep) -> bool:
            is_held_out = isinstance(record, RunCompletion) and record.kind == "held_out"
            return record.step > steps or (is_held_out and record.step not in measured)

        for kind in (StepRecord, RunCompletion, Measurement):
            path = self.path / kind.FILE
            if self.writes and path.exists():
                end = None
                for line in kind.read_lines(self.path):
                    if not is_done_again(line.content):
                        end = None
                    elif end is None:
                        end = line.start
                os.truncate(path, whole_bytes(path) if end is None else end)


class EvaluationFolder(LockedFolder):
    """A folder with one evaluation, which can be stopped at any point and resumed.

    It may be the directory of a run, which may still be training.
    """

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Opens a new or an existing folder.

        Raises:
            UserError: if it cannot be written, is in use, or has an evaluation by an older version
                of this package.
        """
        if not overwrite:
            for kind in (Evaluation, BegunEvaluation):
                kind.check_version(path, _CHOOSE_TO)
        super().__init__(path, kind="evaluation", option="--to", lock=".evaluation.lock")
        self.result = None if overwrite else self.read(Evaluation)
        """The finished evaluation; None while it is not finished."""
        self._begun = None if overwrite else self.read(BegunEvaluation)
        self._earlier_seconds = 0.0
        self._since = time.perf_counter()

    def check_same(self, section: str, values: Mapping[str, object]) -> None:
        """Refuses to resume an evaluation of something else.

        Args:
            section: `settings`, `weights` or `data`.
            values: Their values now, by name.

        Raises:
            ConfigError: naming the first value that differs.
        """
        begun = self.result or self._begun
        before = begun.model_dump()[section] if begun else values
        for name, value in values.items():
            earlier = before.get(name)
            if earlier != value and not is_moved(earlier, value, self.path):
                raise ConfigError(
                    f"evaluation in {self.path}: was made with {name} = {earlier!r}, not "
                    f"{value!r}; {_CHOOSE_TO}"
                )

    def begin(
        self, evaluation: BegunEvaluation, batches: Sequence[int]
    ) -> list[EvaluatedCompletion]:
        """Starts or resumes an evaluation.

        Args:
            evaluation: What is evaluated, unless it is resumed.
            batches: Number of completions of each batch, in the order in which they are appended.

        Returns:
            Records of the whole batches that are there already.
        """
        if not self._begun:
            # In this order, so that what is there always belongs together.
            for kind in (Evaluation, BegunEvaluation, EvaluatedCompletion):
                (self.path / kind.FILE).unlink(missing_ok=True)
            start = {**vars(Start.now()), "schema_version": SCHEMA_VERSION, "seconds": 0.0}
            self._begun = evaluation.model_copy(update=start)
            self.write(self._begun)
        self._earlier_seconds = self._begun.seconds
        self._since = time.perf_counter()
        return self._whole_batches(batches)

    def _whole_batches(self, batches: Sequence[int]) -> list[EvaluatedCompletion]:
        """Reads the records of whole batches, and cuts off those of later ones.

        Batches are known by their place in the file, so those after a damaged line are made again.
        """
        lines = []
        for line in EvaluatedCompletion.read_lines(self.path):
            if line.number > len(lines) + 1:
                break
            lines.append(line)
        kept = max((end for end in accumulate(batches) if end <= len(lines)), default=0)
        path = self.path / EvaluatedCompletion.FILE
        if path.exists():
            with path.open("rb") as file:
                whole = sum(len(line) for line in islice(file, kept))
            os.truncate(path, whole)
        return [line.content for line in lines[:kept]]

    def add(self, records: Sequence[EvaluatedCompletion]) -> None:
        """Appends the records of a batch, all of them or none.

        Raises:
            UserError: if they cannot be written.
        """
        self.append(*records)
        self.write(self._begun_so_far())

    def finish(self, systems: dict[str, System], comparison: Paired | None) -> Evaluation:
        """Writes evaluation.json, which marks the evaluation as finished, and returns it."""
        begun = self._begun_so_far().model_dump(exclude_unset=True)
        self.result = Evaluation(**begun, systems=systems, comparison=comparison)
        self.write(self.result)
        (self.path / BegunEvaluation.FILE).unlink()
        return self.result

    def _begun_so_far(self) -> BegunEvaluation:
        """What is evaluated, with the time of all starts."""
        assert self._begun is not None  # `begin` comes first.
        seconds = self._earlier_seconds + time.perf_counter() - self._since
        return self._begun.model_copy(update={"seconds": seconds})


def read_config(path: Path) -> Config:
    """The configuration of a run directory, its paths as they are now.

    Raises:
        ConfigError: if it cannot be read.
    """
    file = path / "config.toml"
    config = from_mapping(Config, read_toml(str(file)), str(file))
    return moved_along(config, (RunFacts.read(path) or RunFacts()).directory, path)


def check_free_space(path: Path, needed_bytes: int) -> None:
    """Refuses a disk that cannot hold what the run will write.

    Raises:
        UserError: naming what is free and what is needed.
    """
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise UserError(
            f"run directory {path}: {free / 1e6:.0f} MB are free but checkpoints and logs need "
            f"about {needed_bytes / 1e6:.0f} MB; free some space or choose another --run"
        )
