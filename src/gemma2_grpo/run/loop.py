"""The run itself: measure, train, measure again."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.directory import RunDirectory
from gemma2_grpo.run.health import Health
from gemma2_grpo.run.measure import measure
from gemma2_grpo.run.records import completion_fields, find_rises, step_record
from gemma2_grpo.run.results import Measurement, RunResult
from gemma2_grpo.run.schema import RunCompletion, StepRecord
from gemma2_grpo.run.session import Session
from gemma2_grpo.run.source import ADAPTER
from gemma2_grpo.run.trackers import Track
from gemma2_grpo.runtime.memory import MemoryMonitor
from gemma2_grpo.runtime.processes import from_first, gather
from gemma2_grpo.runtime.program_cache import ProgramCount
from gemma2_grpo.task.examples import batch_indices
from gemma2_grpo.task.scoring import Scorer
from gemma2_grpo.training.learner import StepResult

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
        """Trains from the last checkpoint to the result."""
        config, directory = self._config, self._directory
        self._display.plan(self._session.plan)
        first = self._session.finished_steps
        directory.forget_after(first)
        for record in directory.records(StepRecord):
            self._health.add(record.model_dump())
        before = self._measured(0, config.run.eval_samples)
        self._report()
        self._train(first, config.run.max_steps)
        after = self._measured(config.run.max_steps, config.run.eval_samples)
        if not directory.writes:
            return
        self._session.save_adapter(directory.path / ADAPTER)
        rises = find_rises(list(directory.records(StepRecord)))
        result = RunResult(before=before, after=after, rises=tuple(rises))
        directory.write(result)
        self._report()
        self._display.result(result)
        self._display.note(str(self._programs))
        self._display.note(f"report: {directory.path / REPORT}")

    def _report(self) -> None:
        """Rewrites the report; a failure here must not stop training."""
        if not self._directory.writes:
            return
        try:
            self._write_report(self._directory.path)
        except Exception as error:  # Whatever it is, training continues.
            line = " ".join(str(error).split())
            self._display.note(f"the report cannot be written: {type(error).__name__}: {line}")
        self._reported = time.monotonic()

    def _measured(self, step: int, samples: int) -> Measurement:
        """The measurement after so many steps, which a resumed run may have already."""
        records = self._directory.records(Measurement)
        earlier = next((record for record in records if record.step == step), None)
        found = from_first(earlier and earlier.model_dump(mode="json"))
        measurement = Measurement(**found) if found else self._measure(step, samples)
        # Two runs that measure the same have the same result, however long it took.
        return Measurement(**measurement.model_dump(exclude={"seconds"}))

    def _measure(self, step: int, samples: int) -> Measurement:
        held_out = self._session.held_out
        label = f"measuring {len(held_out)} held-out problems"
        started = time.perf_counter()
        with self._display.measuring(label, len(held_out) * (2 if samples else 1)) as on_batch:
            measured = measure(
                self._session.learner,
                held_out,
                self._scorer,
                samples=samples,
                on_batch=on_batch,
                on_greedy=lambda records: self._directory.append(
                    *(
                        RunCompletion(step=step, kind="held_out", **record.model_dump())
                        for record in records
                    )
                ),
            )
        self._display.held_out(step, measured)
        seconds = time.perf_counter() - started
        measurement = Measurement(**measured.model_dump(), step=step, seconds=seconds)
        self._directory.append(measurement)
        self._track("held_out", measurement.model_dump())
        self._health.add_measurement(measurement)
        return measurement

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
                result = self._step(step)
                done = step + 1
                per_step = (time.perf_counter() - started) / (done - first)
                record = step_record(
                    step,
                    result,
                    seconds_left=per_step * (total - done),
                    **self._programs.as_record(),
                    **self._memory.as_record(),
                )
                self._directory.append(record)
                self._track("train", record.model_dump())
                new = self._health.add(record.model_dump())
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

    def _step(self, step: int) -> StepResult:
        """Runs one step and logs its completions."""
        config, session = self._config, self._session
        indices = batch_indices(
            len(session.train), config.rollout.prompts_per_step, config.data.data_seed, step
        )
        result = session.learner.step(step, [session.train[i] for i in indices], self._scorer)
        fields = completion_fields(result.examples, result.completions, result.scores)
        records = [RunCompletion(step=step + 1, kind="train", **each) for each in fields]
        self._directory.append(*records)
        every = config.run.sample_every_steps
        if every and (step + 1) % every == 0:
            self._display.sample(step + 1, records[0])
        return result

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
