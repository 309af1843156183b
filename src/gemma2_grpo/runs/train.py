"""`gemma2-grpo train`: prepare, measure, train, measure again."""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_grpo.config import Config
from gemma2_grpo.runs.display import Display
from gemma2_grpo.runs.measure import measure
from gemma2_grpo.runs.records import find_rises, step_record
from gemma2_grpo.runs.run_directory import RunDirectory
from gemma2_grpo.runs.session import Session, open_session
from gemma2_grpo.task.data import Example, batch_indices, load_splits
from gemma2_grpo.task.scoring import Scorer, load_reward

ADAPTER = "adapter"


def train(
    config: Config,
    run_dir: Path | None,
    config_name: str,
    *,
    allow_config_change: bool = False,
    display: Display | None = None,
) -> Path:
    """Runs or resumes a training run; a finished one is only shown.

    Args:
        config: A checked configuration.
        run_dir: Where the run is written; by default `runs/` and the name of the configuration.
        config_name: Name or path the configuration was loaded from.
        allow_config_change: Resume a run that was made with another configuration.
        display: What shows the progress.

    Returns:
        The run directory.

    Raises:
        UserError: for anything that the user can mend.
    """
    display = display or Display()
    splits = load_splits(config.data)
    reward, reward_sha256 = (
        load_reward(config.rewards.reward) if config.rewards.reward else (None, None)
    )
    path = run_dir or Path("runs") / Path(config_name).stem
    directory = RunDirectory(path, config, allow_config_change=allow_config_change)
    try:
        result = directory.result
        if result and result["after"]["step"] >= config.run.max_steps:
            display.note(f"{path} is finished; its result:")
            _show_result(display, result)
            return path
        directory.check_same("reward_sha256", reward_sha256)
        if reward:
            display.note(f"reward {config.rewards.reward} (sha256 {reward_sha256}) is run as code")
        display.note(f"loading {config.model.model}")
        session = open_session(config, splits, directory)
        directory.describe({**session.facts, "reward_sha256": reward_sha256})
        display.plan(session.plan)
        _Run(config, session, directory, display, Scorer(config.rewards, reward)).go()
    finally:
        directory.close()
    return path


class _Run:
    """One run from its first measurement to its last."""

    def __init__(
        self,
        config: Config,
        session: Session,
        directory: RunDirectory,
        display: Display,
        scorer: Scorer,
    ) -> None:
        self._config = config
        self._session = session
        self._directory = directory
        self._display = display
        self._scorer = scorer
        self._stop_signal: int | None = None

    def go(self) -> None:
        config, directory = self._config, self._directory
        first = self._session.finished_steps
        directory.forget_after(first)
        before = self._measured(0, config.run.eval_samples)
        self._train(first, config.run.max_steps)
        after = self._measured(config.run.max_steps, config.run.eval_samples)
        self._session.save_adapter(directory.path / ADAPTER)
        result = {
            "before": before,
            "after": after,
            "rises": find_rises(list(directory.records("metrics.jsonl"))),
        }
        directory.finish(result)
        _show_result(self._display, result)
        self._display.note(f"run directory: {directory.path}")

    def _measured(self, step: int, samples: int) -> dict[str, Any]:
        """The measurement after so many steps, which a resumed run may have already."""
        records = self._directory.records("evaluations.jsonl")
        earlier = (record for record in records if record["step"] == step)
        return next(earlier, None) or self._measure(step, samples)

    def _measure(self, step: int, samples: int) -> dict[str, Any]:
        held_out = self._session.held_out
        label = f"measuring {len(held_out)} held-out problems"
        with self._display.measuring(label, len(held_out) * (2 if samples else 1)) as on_batch:
            measurement = measure(
                self._session.learner,
                held_out,
                self._scorer,
                samples=samples,
                on_batch=on_batch,
                on_completion=lambda example, text, scores: self._record_completion(
                    step, "held_out", example, text, scores
                ),
            )
        self._display.held_out(step, measurement)
        record = {"step": step, **measurement.as_record()}
        self._directory.append("evaluations.jsonl", record)
        return record

    def _train(self, first: int, total: int) -> None:
        config = self._config
        with ExitStack() as stack:
            stack.enter_context(self._finishing_steps())
            events = stack.enter_context(self._session.events(self._directory.path))
            started = time.perf_counter()
            show = stack.enter_context(self._display.training(first, total))
            every = config.run.eval_every_steps
            for step in range(first, total):
                if step and every and step % every == 0:
                    self._measured(step, 0)
                record = self._step(step)
                done = step + 1
                record["seconds_left"] = (
                    (time.perf_counter() - started) / (done - first) * (total - done)
                )
                self._directory.append("metrics.jsonl", record)
                events(record)
                show(record)
                if (
                    done % config.run.checkpoint_every_steps == 0
                    or done == total
                    or self._stop_signal
                ):
                    self._session.save(done)
                if self._stop_signal:
                    raise SystemExit(128 + self._stop_signal)

    def _step(self, step: int) -> dict[str, Any]:
        """Runs one step and logs its completions; returns its record."""
        config, session = self._config, self._session
        indices = batch_indices(
            len(session.train), config.rollout.prompts_per_step, config.data.data_seed, step
        )
        result = session.learner.step(step, [session.train[i] for i in indices], self._scorer)
        for i, (example, text) in enumerate(
            zip(result.examples, result.completions.texts, strict=True)
        ):
            scores = {name: float(column[i]) for name, column in result.scores.items()}
            self._record_completion(step + 1, "train", example, text, scores)
        every = config.run.sample_every_steps
        if every and (step + 1) % every == 0:
            shown = {name: float(column[0]) for name, column in result.scores.items()}
            self._display.sample(
                step + 1, result.examples[0].question, result.completions.texts[0], shown
            )
        return step_record(step, result)

    def _record_completion(
        self, step: int, kind: str, example: Example, text: str, scores: Mapping[str, float]
    ) -> None:
        self._directory.append(
            "completions.jsonl",
            {
                "step": step,
                "kind": kind,
                "question": example.question,
                "answer": example.answer,
                "completion": text,
                # JSON has no NaN; null is what it stands for here.
                **{name: None if np.isnan(value) else value for name, value in scores.items()},
            },
        )

    @contextmanager
    def _finishing_steps(self) -> Iterator[None]:
        """Lets SIGTERM and SIGINT end the run after its current step, with a checkpoint."""

        def remember(number: int, _: Any) -> None:
            self._stop_signal = number
            self._display.note("stopping after this step")

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, remember) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def _show_result(display: Display, result: Mapping[str, Any]) -> None:
    display.before_and_after(result["before"], result["after"])
    display.rises(result["rises"])
