"""The run itself: measure, train, measure again."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.directory import RunDirectory
from gemma2_grpo.run.health import Health
from gemma2_grpo.run.measure import measure
from gemma2_grpo.run.records import find_rises, step_record
from gemma2_grpo.run.session import Session
from gemma2_grpo.run.source import ADAPTER
from gemma2_grpo.run.trackers import Track
from gemma2_grpo.runtime.memory import MemoryMonitor
from gemma2_grpo.runtime.processes import from_first, gather, is_first
from gemma2_grpo.runtime.program_cache import ProgramCount
from gemma2_grpo.task.examples import Example, batch_indices
from gemma2_grpo.task.scoring import Scorer

REPORT = "report.html"
_REPORT_EVERY_SECONDS = 60


class Run:
    """One run from its first measurement to its last."""

    def __init__(
        self,
        session: Session,
        directory: RunDirectory,
        scorer: Scorer,
        display: Display,
        programs: ProgramCount,
        track: Track,
        report: Callable[[Path], object],
    ) -> None:
        """Takes an open session, the directory of its run, and what writes its report."""
        self._config = session.config
        self._session = session
        self._directory = directory
        self._scorer = scorer
        self._display = display
        self._programs = programs
        self._memory = MemoryMonitor()
        self._track = track
        self._write_report = report
        self._health = Health()
        self._reported = -math.inf
        self._stop_signal: int | None = None

    def go(self) -> None:
        """Goes from where the run stands to its result."""
        config, directory = self._config, self._directory
        self._display.plan(self._session.plan)
        first = self._session.finished_steps
        directory.forget_after(first)
        for record in directory.records("metrics.jsonl"):
            self._health.add(record)
        before = self._measured(0, config.run.eval_samples)
        self._report()
        self._train(first, config.run.max_steps)
        after = self._measured(config.run.max_steps, config.run.eval_samples)
        if not is_first():
            return
        self._session.save_adapter(directory.path / ADAPTER)
        result = {
            "before": before,
            "after": after,
            "rises": find_rises(list(directory.records("metrics.jsonl"))),
        }
        directory.finish(result)
        self._report()
        self._display.result(result)
        self._display.note(str(self._programs))
        self._display.note(f"report: {directory.path / REPORT}")

    def _report(self) -> None:
        """Writes the report anew; a run is worth more than its report."""
        if not is_first():
            return
        try:
            self._write_report(self._directory.path)
        except Exception as error:  # Whatever it is, training goes on.
            line = " ".join(str(error).split())
            self._display.note(f"the report cannot be written: {type(error).__name__}: {line}")
        self._reported = time.monotonic()

    def _measured(self, step: int, samples: int) -> dict[str, Any]:
        """The measurement after so many steps, which a resumed run may have already."""
        records = self._directory.records("evaluations.jsonl")
        earlier = (record for record in records if record["step"] == step)
        record = from_first(next(earlier, None)) or self._measure(step, samples)
        # Two runs that measure the same have the same result, however long it took.
        return {name: value for name, value in record.items() if name != "seconds"}

    def _measure(self, step: int, samples: int) -> dict[str, Any]:
        held_out = self._session.held_out
        label = f"measuring {len(held_out)} held-out problems"
        started = time.perf_counter()
        with self._display.measuring(label, len(held_out) * (2 if samples else 1)) as on_batch:
            measurement = measure(
                self._session.learner,
                held_out,
                self._scorer,
                samples=samples,
                on_batch=on_batch,
                on_scored=lambda texts, cuts, scores: self._record_completions(
                    step, "held_out", held_out, texts, cuts, scores
                ),
            )
        self._display.held_out(step, measurement)
        seconds = time.perf_counter() - started
        record = {"step": step, **measurement.as_record(), "seconds": seconds}
        self._directory.append("evaluations.jsonl", record)
        self._track("held_out", record)
        self._health.add_evaluation(record)
        return record

    def _train(self, first: int, total: int) -> None:
        config = self._config
        with ExitStack() as stack:
            stack.enter_context(self._finishing_steps())
            started = time.perf_counter()
            show = stack.enter_context(self._display.training(first, total))
            every = config.run.eval_every_steps
            for step in range(first, total):
                if step and every and step % every == 0:
                    self._measured(step, 0)
                record = self._step(step)
                record |= self._programs.as_record() | self._memory.as_record()
                done = step + 1
                per_step = (time.perf_counter() - started) / (done - first)
                record["seconds_left"] = per_step * (total - done)
                self._directory.append("metrics.jsonl", record)
                self._track("train", record)
                new = self._health.add(record)
                show(record, [a.what for a in new], [a.what for a in self._health.active])
                if warning := self._memory.warning():
                    self._display.note(warning)
                if step == first:
                    self._display.note(str(self._programs))
                is_due = done % config.run.checkpoint_every_steps == 0 or done == total
                # A signal may have come to one of the processes only.
                stop_signal = max(gather(self._stop_signal or 0))
                if is_due or stop_signal:
                    self._session.save(done)
                    if stop_signal or time.monotonic() - self._reported > _REPORT_EVERY_SECONDS:
                        self._report()
                if stop_signal:
                    self._display.note(f"stopped after step {done}; run again to resume")
                    raise SystemExit(128 + stop_signal)

    def _step(self, step: int) -> dict[str, Any]:
        """Runs one step and logs its completions; returns its record."""
        config, session = self._config, self._session
        indices = batch_indices(
            len(session.train), config.rollout.prompts_per_step, config.data.data_seed, step
        )
        result = session.learner.step(step, [session.train[i] for i in indices], self._scorer)
        texts = result.completions.texts
        cuts = result.completions.is_truncated
        self._record_completions(step + 1, "train", result.examples, texts, cuts, result.scores)
        every = config.run.sample_every_steps
        if every and (step + 1) % every == 0:
            scores = {name: float(column[0]) for name, column in result.scores.items()}
            self._display.sample(step + 1, result.examples[0].question, texts[0], scores)
        return step_record(step, result)

    def _record_completions(
        self,
        step: int,
        kind: str,
        examples: Sequence[Example],
        texts: Sequence[str],
        is_truncated: np.ndarray,
        scores: Mapping[str, np.ndarray],
    ) -> None:
        records = [
            {
                "step": step,
                "kind": kind,
                "question": example.question,
                "answer": example.answer,
                "completion": text,
                "truncated": bool(is_truncated[i]),
                **{name: float(column[i]) for name, column in scores.items()},
            }
            for i, (example, text) in enumerate(zip(examples, texts, strict=True))
        ]
        self._directory.append("completions.jsonl", *records)

    @contextmanager
    def _finishing_steps(self) -> Iterator[None]:
        """Lets SIGTERM and SIGINT end the run after its current step, with a checkpoint."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.getsignal(number) for number in numbers]

        def restore() -> None:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

        def remember(number: int, _: Any) -> None:
            # Nothing is printed: the signal may have come in the middle of a print. A second one
            # ends the process at once.
            self._stop_signal = number
            restore()

        for number in numbers:
            signal.signal(number, remember)
        try:
            yield
        finally:
            restore()
