"""The run itself: measure, train, measure again."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.directory import RunDirectory
from gemma2_grpo.run.health import Health
from gemma2_grpo.run.measure import measure
from gemma2_grpo.run.records import find_rises, scored_completions, step_record
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
from gemma2_grpo.training.supervised import SupervisedLearner

REPORT = "report.html"
_REPORT_EVERY_SECONDS = 60


@dataclass
class Run:
    """One run from its first measurement to its last."""

    session: Session
    directory: RunDirectory
    scorer: Scorer
    display: Display
    programs: ProgramCount
    track: Track
    write_report: Callable[[Path], object]
    _memory: MemoryMonitor = field(init=False)
    _health: Health = field(init=False, default_factory=Health)
    _reported: float = field(init=False, default=-math.inf)
    _stop_signal: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Watches the memory of the devices that the run has."""
        self._memory = MemoryMonitor()

    def go(self) -> None:
        """Trains from the last checkpoint to the result."""
        config, directory = self.session.config, self.directory
        self.display.plan(self.session.plan)
        first = self.session.finished_steps
        directory.forget_after(first)
        for record in directory.records(StepRecord):
            self._health.add(record.model_dump())
        before = self._measured(0, config.run.eval_samples)
        self._report()
        self._train(first, config.run.max_steps)
        after = self._measured(config.run.max_steps, config.run.eval_samples)
        if not directory.writes:
            return
        self.session.save_adapter(directory.path / ADAPTER)
        rises = find_rises(list(directory.records(StepRecord)))
        result = RunResult(before=before, after=after, rises=tuple(rises))
        directory.write(result)
        self._report()
        self.display.result(result)
        self.display.note(str(self.programs))
        self.display.note(f"report: {directory.path / REPORT}")

    def _report(self) -> None:
        """Rewrites the report; a failure here must not stop training."""
        if not self.directory.writes:
            return
        try:
            self.write_report(self.directory.path)
        except Exception as error:  # Whatever it is, training continues.
            line = " ".join(str(error).split())
            self.display.note(f"the report cannot be written: {type(error).__name__}: {line}")
        self._reported = time.monotonic()

    def _measured(self, step: int, samples: int) -> Measurement:
        """The measurement after so many steps, which a resumed run may have already."""
        records = self.directory.records(Measurement)
        earlier = next((record for record in records if record.step == step), None)
        found = from_first(earlier and earlier.model_dump(mode="json"))
        measurement = Measurement(**found) if found else self._measure(step, samples)
        # Two runs that measure the same have the same result, however long it took.
        return Measurement(**measurement.model_dump(exclude={"seconds"}))

    def _measure(self, step: int, samples: int) -> Measurement:
        held_out = self.session.held_out
        label = f"measuring {len(held_out)} held-out problems"
        started = time.perf_counter()
        with self.display.measuring(label, len(held_out) * (2 if samples else 1)) as on_batch:
            measured = measure(
                self.session.learner,
                held_out,
                self.scorer,
                samples=samples,
                on_batch=on_batch,
                on_greedy=lambda records: self.directory.append(
                    *(RunCompletion(step=step, kind="held_out", **vars(each)) for each in records)
                ),
            )
        learner = self.session.learner
        is_supervised = isinstance(learner, SupervisedLearner)
        nll = learner.solution_nll(held_out) if is_supervised else None
        self.display.held_out(step, measured, nll)
        seconds = time.perf_counter() - started
        measurement = Measurement(
            **measured.model_dump(), step=step, seconds=seconds, solution_nll=nll
        )
        self.directory.append(measurement)
        self.track("held_out", measurement.model_dump())
        self._health.add_measurement(measurement)
        return measurement

    def _train(self, first: int, total: int) -> None:
        config = self.session.config
        with ExitStack() as stack:
            stack.enter_context(self._finishing_steps())
            started = time.perf_counter()
            show = stack.enter_context(self.display.training(first, total))
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
                    **self.programs.as_record(),
                    **self._memory.as_record(),
                )
                self.directory.append(record)
                self.track("train", record.model_dump())
                new = self._health.add(record.model_dump())
                show(record, [a.what for a in new], [a.what for a in self._health.active])
                if warning := self._memory.warning():
                    self.display.note(warning)
                if step == first:
                    self.display.note(str(self.programs))
                is_due = done % config.run.checkpoint_every_steps == 0 or done == total
                # A signal may have come to one of the processes only.
                stop_signal = max(gather(self._stop_signal or 0))
                if is_due or stop_signal:
                    self.session.save(done)
                    if stop_signal or time.monotonic() - self._reported > _REPORT_EVERY_SECONDS:
                        self._report()
                if stop_signal:
                    self.display.note(f"stopped after step {done}; run again to resume")
                    raise SystemExit(128 + stop_signal)

    def _step(self, step: int) -> StepResult:
        """Runs one step and logs its completions."""
        config, session = self.session.config, self.session
        indices = batch_indices(
            len(session.train), config.rollout.prompts_per_step, config.data.data_seed, step
        )
        result = session.learner.step(step, [session.train[i] for i in indices], self.scorer)
        scored = scored_completions(result.examples, result.completions, result.scores)
        records = [RunCompletion(step=step + 1, kind="train", **vars(each)) for each in scored]
        self.directory.append(*records)
        every = config.run.sample_every_steps
        if every and (step + 1) % every == 0:
            self.display.sample(step + 1, records[0])
        return result

    @contextmanager
    def _finishing_steps(self) -> Iterator[None]:
        """Lets SIGTERM and SIGINT end the run after its current step, with a checkpoint."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.getsignal(number) for number in numbers]

        def restore() -> None:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

        def remember(number: int, _: object) -> None:
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
