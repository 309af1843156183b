"""Measuring models on held-out problems, for train and evaluate: batches, completions, scores."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.directory import EvaluationFolder
from gemma2_grpo.run.panel import EvaluationProgress
from gemma2_grpo.run.records import compare_systems, scored_completions, summarize
from gemma2_grpo.run.results import (
    ADAPTER,
    BASE,
    BegunEvaluation,
    EvaluatedCompletion,
    Evaluation,
    System,
)
from gemma2_grpo.run.source import Opened
from gemma2_grpo.runtime.processes import gather, has_turn
from gemma2_grpo.sampling.rollout import Completions, Sample
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import render_prompt
from gemma2_grpo.task.scoring import Scorer
from gemma2_grpo.training.learner import Learner, Scores, Stream, fold_key

# --- Batches ---


@dataclass(frozen=True)
class Batch:
    """Completions that are made together."""

    system: str
    index: int
    """Number among the batches of its system and kind."""
    size: int
    """Prompts; the last batch may have fewer problems."""
    first: int
    """Index of the first problem."""
    problems: int
    samples: int
    """Samples of each problem; 0 for the greedy completion."""

    @property
    def group(self) -> int:
        """Completions of each problem."""
        return max(self.samples, 1)

    @property
    def completions(self) -> int:
        """Completions of the batch."""
        return self.problems * self.group


def plan_batches(
    systems: Sequence[str], problems: int, samples: int, batch_prompts: int
) -> Iterator[Batch]:
    """All batches: greedy ones first, the systems in turn on the same problems.

    A batch of samples has about as many completions as one of greedy ones.
    """
    for each in (0, samples) if samples else (0,):
        size = max(1, batch_prompts // max(each, 1))
        for index, first in enumerate(range(0, problems, size)):
            for system in systems:
                yield Batch(system, index, size, first, min(size, problems - first), each)


def complete_batch(
    sample: Sample, examples: Sequence[Example], batch: Batch, seed: int
) -> Completions:
    """Completes a batch, the same whichever batches came before."""
    # A last, short batch is filled up with others, so that one program serves all.
    chosen = islice(cycle(examples), batch.first, batch.first + batch.size)
    prompts = [render_prompt(example.question) for example in chosen]
    # Greedy decoding draws nothing; sampling draws from a stream that training never sees.
    key = fold_key(seed, Stream.EVAL, batch.group, batch.index)
    done = sample(prompts, batch.group, key, greedy=not batch.samples)
    return done.first(batch.completions)


def score_batches(
    done: Sequence[tuple[Batch, Completions]], examples: Sequence[Example], score: Scores
) -> list[EvaluatedCompletion]:
    """Scores completed batches, all at one time, and makes their records."""
    if not done:  # A user's reward need not cope with no completions at all.
        return []
    places = [(batch, i) for batch, _ in done for i in range(batch.completions)]
    completions = Completions(
        [text for _, part in done for text in part.texts],
        [row for _, part in done for row in part.tokens],
        np.concatenate([part.is_truncated for _, part in done]),
    )
    indices = [batch.first + i // batch.group for batch, i in places]
    asked = [examples[index] for index in indices]
    scores = score(asked, completions.texts, completions.is_truncated)
    scored = scored_completions(asked, completions, scores)
    return [
        EvaluatedCompletion(
            system=batch.system,
            index=index,
            sample=i % batch.group if batch.samples else None,
            **vars(each),
        )
        for (batch, i), index, each in zip(places, indices, scored, strict=True)
    ]


# --- In training ---


def measure(
    learner: Learner,
    examples: Sequence[Example],
    score: Scores,
    *,
    samples: int = 0,
    on_batch: Callable[[int], None] = lambda done: None,
    on_greedy: Callable[[Sequence[EvaluatedCompletion]], None] = lambda records: None,
) -> System:
    """Measures the policy on examples; the same examples and seed give the same result.

    The processes complete batches in turn, and each scores its own.

    Args:
        learner: The policy.
        examples: Held-out problems.
        score: Scores the completions.
        samples: Completions sampled per problem besides the greedy one.
        on_batch: Called with the number of problems that are done.
        on_greedy: Called with the greedy completions of all processes.
    """
    run = learner.config.run
    batches = list(plan_batches((ADAPTER,), len(examples), samples, run.eval_batch_prompts))
    records: list[EvaluatedCompletion] = []
    for kind in (0, samples) if samples else (0,):
        done = []
        for batch in (batch for batch in batches if batch.samples == kind):
            if has_turn(batch.index):
                done.append((batch, complete_batch(learner.sample, examples, batch, run.seed)))
            on_batch(batch.problems)
        own = [record.model_dump() for record in score_batches(done, examples, score)]
        everyones = [EvaluatedCompletion(**each) for part in gather(own) for each in part]
        records += sorted(everyones, key=lambda record: (record.index, record.sample or 0))
        if not kind:
            on_greedy(records)
    return summarize(records, examples)[ADAPTER]


# --- `gemma2-grpo evaluate` ---


class Evaluator:
    """A resumable evaluation: base and adapter in turn on the same problems, batch by batch."""

    def __init__(
        self,
        opened: Opened,
        examples: Sequence[Example],
        samples: int,
        folder: EvaluationFolder,
        display: Display,
    ) -> None:
        """Takes models and problems, and the folder that the evaluation is written to."""
        self._config = opened.config
        self._examples = examples
        self._folder = folder
        self._display = display
        # A user's own reward is not run: it may have gone, and nothing here is trained on it.
        self._scorer = Scorer(opened.config.rewards)
        systems = (BASE, ADAPTER) if opened.policy is not None else (BASE,)
        self._samplers = {name: opened.sampler(adapted=name == ADAPTER) for name in systems}
        batch_prompts = opened.config.run.eval_batch_prompts
        self._batches = list(plan_batches(systems, len(examples), samples, batch_prompts))

    def go(self, begun: BegunEvaluation) -> Evaluation:
        """Completes what is left, and writes the statistics of everything."""
        records = self._folder.begin(begun, [batch.completions for batch in self._batches])
        self._show_plan(begun, len(records))
        total = sum(batch.completions for batch in self._batches)
        done = 0
        with EvaluationProgress(self._display.console, total, records) as progress:
            for batch in self._batches:
                done += batch.completions
                if done > len(records):
                    sample, seed = self._samplers[batch.system], self._config.run.seed
                    completions = complete_batch(sample, self._examples, batch, seed)
                    made = score_batches([(batch, completions)], self._examples, self._scorer)
                    self._folder.add(made)
                    records += made
                    progress.add(made)
        systems = summarize(records, self._examples)
        return self._folder.finish(systems, compare_systems(records))

    def _show_plan(self, begun: BegunEvaluation, done: int) -> None:
        data, step = begun.data, begun.step
        adapter = f"adapter of {step} steps" if step else f"adapter {self._config.model.adapter}"
        each = "1 greedy completion"
        if samples := self._batches[-1].samples:
            each += f", {samples} sampled at temperature {self._config.rollout.temperature:g}"
        self._display.plan(
            {
                "model": begun.model + (f", {adapter}" if len(self._samplers) > 1 else ""),
                "problems": f"{data.num_problems} of {data.source}, {data.split}; "
                f"{data.num_dropped} too long, dropped",
                "each": each,
                **({"resuming": f"{done} completions are there"} if done else {}),
            }
        )
