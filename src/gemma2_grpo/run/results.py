"""The records of measurements, by a run and by `evaluate`; one model for each file.

See `schema.py` for the names.
"""

from typing import Annotated, ClassVar, Self

from pydantic import Field, JsonValue, model_validator

from gemma2_grpo.run.schema import AtStep, Data, Nats, Number, ScoredCompletion, Start, Versioned
from gemma2_grpo.runtime.folder import Part, Record
from gemma2_grpo.task.statistics import Paired

BASE, ADAPTER = "base", "adapter"
"""Systems that `evaluate` measures."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Interval = tuple[Fraction, Fraction]


class EvaluatedCompletion(ScoredCompletion):
    """One completion of a held-out problem."""

    FILE: ClassVar[str] = "evaluation_completions.jsonl"

    system: str
    """`base` or `adapter`."""
    index: int
    """Number of the problem, from 0."""
    sample: int | None
    """Number of the sample, from 0; null for the greedy completion."""


class HeldOutData(Data):
    """The problems that were evaluated."""

    split: str = ""
    """`test` or `validation`."""
    sha256: str = ""
    """Hash of the problems, in order."""
    num_problems: int = 0
    """Problems that were evaluated."""


class Measures(Part):
    """Statistics of completions, one or several of each problem."""

    correct_fraction: Fraction
    """Completions whose answer is right; for sampled ones, pass@1."""
    correct_fraction_interval: Interval
    """95 % interval of `correct_fraction`, with problems as the unit."""
    perfect_format_fraction: Fraction
    """Completions in perfect format."""
    true_equations_fraction: Fraction
    """Written equations that hold, over all completions."""
    truncated_fraction: Fraction
    """Completions that reached `max_completion_tokens` before they ended."""
    mean_completion_tokens: float
    """Mean length of the completions."""
    mean_reward: Number
    """Mean reward; null if no completion has one. `evaluate` leaves a user's own reward out."""


class StepsMeasures(Part):
    """Greedy accuracy on the problems whose worked solution has so many steps."""

    solution_steps: Annotated[int, "steps"]
    """Steps of the worked solution."""
    num_problems: int
    """Problems with such a solution."""
    num_correct: int
    """Problems whose greedy answer is right."""
    correct_fraction: Fraction
    """`num_correct` as a part of `num_problems`."""
    correct_fraction_interval: Interval
    """95 % interval of `correct_fraction`."""


class GreedyMeasures(Measures):
    """Statistics of the greedy completion of each problem."""

    num_problems: int = Field(ge=1)
    """Problems, each with one greedy completion."""
    num_correct: int = Field(ge=0)
    """Completions whose answer is right."""
    num_official_correct: int
    """Completions whose answer is right by GSM8K's own extraction."""
    official_correct_fraction: Fraction
    """`num_official_correct` as a part of `num_problems`."""
    by_solution_steps: tuple[StepsMeasures, ...] = ()
    """Accuracy by the length of the worked solution; empty if the data has none."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if self.num_correct > self.num_problems:
            raise ValueError("more answers are right than there are problems")
        return self


class SampledMeasures(Measures):
    """Statistics of several sampled completions of each problem."""

    num_samples: int = Field(ge=1)
    """Completions of each problem."""
    pass_at_k: dict[int, Fraction]
    """Chance that at least one of k samples is right, by k (unbiased estimate)."""
    maj_at_k: dict[int, Fraction]
    """Chance that the right answer wins a vote of k samples, by k."""


class System(Part):
    """Measures of one model."""

    greedy: GreedyMeasures
    """Greedy completions."""
    sampled: SampledMeasures | None = None
    """Sampled completions; null if none were drawn."""


class Measurement(System, AtStep):
    """One measurement of the policy on the held-out problems."""

    FILE: ClassVar[str] = "evaluations.jsonl"

    seconds: Number = None
    """Time that the measurement took."""
    solution_nll: Nats = None
    """Mean negative log-likelihood of a token of the problems' worked solutions; null but for
    supervised training."""


class Rise(Part):
    """Rise of a reward component over the run."""

    name: str
    """Name of the component."""
    first: float
    """Mean of the component over the first five steps."""
    last: float
    """Mean of the component over the last five steps."""
    half_way_step: int | None
    """Step from which its mean over five steps stays above the middle of both; null if none."""


class RunResult(Record):
    """The result of a finished run."""

    FILE: ClassVar[str] = "result.json"

    before: Measurement
    """Measurement before the first step, as in `evaluations.jsonl` but without `seconds`."""
    after: Measurement
    """Measurement after the last step, likewise."""
    rises: tuple[Rise, ...]
    """Rises of the components for which they are reported."""


class Evaluation(Start, Versioned):
    """The result of `gemma2-grpo evaluate`; until it is finished, `evaluation_begun.json`."""

    FILE: ClassVar[str] = "evaluation.json"

    name: str = ""
    """Name of the run or model."""
    model: str = ""
    """The base model."""
    step: int = 0
    """Training steps of the adapter; 0 for a model."""
    data: HeldOutData = HeldOutData()
    """The problems."""
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Every setting that decides what is computed, under its name on the command line."""
    weights: dict[str, JsonValue] = Field(default_factory=dict)
    """Base model, adapter and their hashes."""
    seconds: float = 0.0
    """Time that the evaluation took, over all starts."""
    systems: dict[str, System] = Field(default_factory=dict)
    """`greedy` and `sampled` of the systems `base` and `adapter`."""
    comparison: Paired | None = None
    """Greedy answers of both to the same problems; null with one system."""


class BegunEvaluation(Evaluation):
    """The beginning of evaluation.json while the evaluation is not finished."""

    FILE: ClassVar[str] = "evaluation_begun.json"
