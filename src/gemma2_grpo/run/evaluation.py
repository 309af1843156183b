"""A resumable evaluation: base and adapter in turn on the same problems, batch by batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2_grpo.run.console import Display
from gemma2_grpo.run.evaluation_folder import EvaluationFolder
from gemma2_grpo.run.evaluation_view import Progress
from gemma2_grpo.run.measure import complete_batch
from gemma2_grpo.run.source import Opened
from gemma2_grpo.run.summary import ADAPTER, BASE, summarize
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.scoring import Scorer


@dataclass(frozen=True)
class Batch:
    """Completions that are made, scored and written together."""

    system: str
    index: int
    """Among the batches of its system and kind."""
    size: int
    """Prompts."""
    first: int
    """Its first problem."""
    problems: int
    samples: int
    """Of each problem; 0 for the greedy completion."""

    @property
    def completions(self) -> int:
        """How many it has."""
        return self.problems * max(self.samples, 1)


def plan_batches(
    systems: Sequence[str], problems: int, samples: int, batch_prompts: int
) -> Iterator[Batch]:
    """All batches: greedy ones first, the systems in turn on the same problems."""
    for each in (0, samples) if samples else (0,):
        size = max(1, batch_prompts // max(each, 1))
        for index, first in enumerate(range(0, problems, size)):
            for system in systems:
                yield Batch(system, index, size, first, min(size, problems - first), each)


class Evaluation:
    """One evaluation, from where it stands to its result."""

    def __init__(
        self,
        opened: Opened,
        examples: Sequence[Example],
        samples: int,
        folder: EvaluationFolder,
        display: Display,
    ) -> None:
        """Takes what is evaluated on what, and the folder that it is written to."""
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

    def go(self, facts: Mapping[str, Any]) -> None:
        """Completes what is left, and writes the statistics of everything."""
        records = self._folder.begin(facts, [batch.completions for batch in self._batches])
        self._tell_plan(facts, len(records))
        total = sum(batch.completions for batch in self._batches)
        done = 0
        with Progress(self._display.console, total, records) as progress:
            for batch in self._batches:
                done += batch.completions
                if done > len(records):
                    new = self._complete(batch)
                    self._folder.add(new)
                    records += new
                    progress.add(new)
        self._folder.finish(summarize(records, self._examples))

    def _tell_plan(self, facts: Mapping[str, Any], done: int) -> None:
        data, settings = facts["data"], facts["settings"]
        steps = facts["steps"]
        adapter = f"adapter of {steps} steps" if steps else f"adapter {self._config.model.adapter}"
        sampled = f", {settings['eval_samples']} sampled at temperature {settings['temperature']:g}"
        self._display.plan(
            {
                "model": facts["model"] + (f", {adapter}" if len(self._samplers) > 1 else ""),
                "problems": f"{data['problems']} of {data['source']}, {data['split']}; "
                f"{data['dropped']} too long, dropped",
                "each": f"1 greedy completion{sampled if settings['eval_samples'] else ''}",
                **({"resuming": f"{done} completions are there"} if done else {}),
            }
        )

    def _complete(self, batch: Batch) -> list[dict[str, Any]]:
        """The records of a batch."""
        group = max(batch.samples, 1)
        completions = complete_batch(
            self._samplers[batch.system],
            self._examples,
            batch.index,
            batch.size,
            group,
            self._config.run.seed,
            greedy=not batch.samples,
        )
        indices = [batch.first + i // group for i in range(batch.completions)]
        asked = [self._examples[index] for index in indices]
        scores = self._scorer(asked, completions.texts, completions.is_truncated)
        return [
            {
                "system": batch.system,
                "index": index,
                "sample": i % group if batch.samples else None,
                "question": example.question,
                "answer": example.answer,
                "completion": completions.texts[i],
                "tokens": len(completions.tokens[i]),
                "truncated": bool(completions.is_truncated[i]),
                **{name: float(column[i]) for name, column in scores.items()},
            }
            for i, (index, example) in enumerate(zip(indices, asked, strict=True))
        ]
