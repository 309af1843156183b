"""Where an evaluation is written, so that it can be killed at any time and gone on with."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from gemma2_grpo.errors import ConfigError
from gemma2_grpo.run.directory import LockedFolder, read_json, utc_now
from gemma2_grpo.run.recorded_paths import is_moved

RESULT = "evaluation.json"
COMPLETIONS = "evaluation_completions.jsonl"
# What evaluation.json will say of settings, data and weights; it is gone when that is there.
_BEGUN = "evaluation_begun.json"


class EvaluationFolder(LockedFolder):
    """A folder with one evaluation; of a run directory, the run itself may go on beside it."""

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        """Opens a new or an existing folder.

        Raises:
            UserError: if it cannot be written, or is in use.
        """
        super().__init__(path, kind="evaluation", option="--to", lock=".evaluation.lock")
        self.result = None if overwrite else read_json(path / RESULT)
        """What a finished evaluation said; None while it is not finished."""
        self._begun = {} if overwrite else self.result or read_json(path / _BEGUN) or {}
        self._earlier_seconds = 0.0
        self._since = time.perf_counter()

    def check_same(self, section: str, values: Mapping[str, Any]) -> None:
        """Refuses to go on with an evaluation of something else.

        Args:
            section: `settings`, `weights` or `data`.
            values: By name, as they are now.

        Raises:
            ConfigError: naming the first that the evaluation was made with another value of.
        """
        before = self._begun.get(section, values)
        for name, value in values.items():
            earlier = before.get(name)
            if earlier != value and not is_moved(earlier, value, self.path):
                raise ConfigError(
                    f"evaluation in {self.path}: was made with {name} = {earlier!r}, not "
                    f"{value!r}; choose another --to, or begin anew with --overwrite"
                )

    def begin(self, facts: Mapping[str, Any], batches: Sequence[int]) -> list[dict[str, Any]]:
        """Starts an evaluation, or goes on with it.

        Args:
            facts: What evaluation.json will begin with.
            batches: Completions of each batch, in the order in which they are appended.

        Returns:
            Records of the whole batches that are there already.
        """
        if not self._begun:
            # In this order, so that what is there always belongs together.
            for name in (RESULT, _BEGUN, COMPLETIONS):
                (self.path / name).unlink(missing_ok=True)
            self._begun = {**facts, "started": utc_now(), "seconds": 0.0}
            self.write(_BEGUN, json.dumps(self._begun, indent=1))
        self._earlier_seconds = self._begun["seconds"]
        self._since = time.perf_counter()
        return self._whole_batches(batches)

    def _whole_batches(self, batches: Sequence[int]) -> list[dict[str, Any]]:
        """Reads the records of whole batches, and cuts off what a killed process left of one."""
        path = self.path / COMPLETIONS
        if not path.exists():
            return []
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]
        ends = [end for end in accumulate(batches) if end <= len(lines)]
        kept = lines[: ends[-1] if ends else 0]
        os.truncate(path, sum(map(len, kept)))
        return [json.loads(line) for line in kept]

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends the records of a batch, all of them or none.

        Raises:
            UserError: if they cannot be written.
        """
        self.append(COMPLETIONS, *records)
        self._note_seconds()
        self.write(_BEGUN, json.dumps(self._begun, indent=1))

    def finish(self, statistics: Mapping[str, Any]) -> dict[str, Any]:
        """Writes evaluation.json, which marks the evaluation as finished, and returns it."""
        self._note_seconds()
        self.result = {**self._begun, **statistics}
        self.write(RESULT, json.dumps(self.result, indent=1))
        (self.path / _BEGUN).unlink()
        return self.result

    def _note_seconds(self) -> None:
        seconds = self._earlier_seconds + time.perf_counter() - self._since
        self._begun = {**self._begun, "seconds": seconds}
