"""`gemma2-grpo ask`: the answer of a model as it comes, by tag, with its equations checked."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from tyro.conf import Positional, arg

from gemma2_grpo.checks import check_fields
from gemma2_grpo.commands.options import Source as SourceName
from gemma2_grpo.config import EvaluateConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.prompts import parse_completion, render_prompt

if TYPE_CHECKING:
    from rich.console import Console

    from gemma2_grpo.run.source import Opened, Source
    from gemma2_grpo.sampling.rollout import Sample

_QUESTION = "question> "
_BASE = "base"


@dataclass(frozen=True)
class Ask:
    """Ask a trained run or any Gemma 2 or 3 a question, and see its equations checked."""

    source: SourceName
    """Run directory, model directory, Hugging Face or Kaggle id, or `embedded`."""
    question: Annotated[Positional[str | None], arg(metavar="[QUESTION]")] = None
    """The question, in quotes. Without one, questions are asked for until an empty line."""
    samples: int = 1
    """1 gives the greedy answer; more are sampled, and vote."""
    compare: Annotated[str | None, arg(metavar="base|RUN|MODEL")] = None
    """Show the answer of another run or model first; `base` is the one that the run began with."""
    temperature: float | None = None
    """Temperature of the samples. Default: that of the run."""
    max_completion_tokens: int | None = None
    """Longer answers are cut off. Default: that of the run."""
    seed: int = 0
    """Seed of the samples."""

    def __call__(self, console: "Console | None" = None) -> None:
        """Answers one question, or each that is typed until an empty line.

        Raises:
            UserError: for anything that the user can correct.
        """
        from gemma2_grpo.run.console import open_console
        from gemma2_grpo.run.source import as_asked, find_source
        from gemma2_grpo.runtime.devices import require_jax

        require_jax()
        console = console or open_console()
        if self.samples < 1:
            raise UserError(f"samples = {self.samples} must be at least 1")
        if self.question is not None and not self.question.strip():
            raise UserError(
                "the question is blank; write it in quotes, or leave it out to be asked"
            )
        asked_for = EvaluateConfig(
            temperature=self.temperature,
            max_completion_tokens=self.max_completion_tokens,
            seed=self.seed,
        )
        check_fields(asked_for)
        source = as_asked(find_source(self.source), asked_for)
        if self.compare == _BASE and source.run is None:
            raise UserError(f"{self.source} is no run; --compare base shows the base of a run")
        is_other = self.compare not in (None, _BASE)
        other = as_asked(find_source(str(self.compare)), asked_for) if is_other else None
        _start(source, console)
        systems = [_open(source, console)]
        if other:
            systems.insert(0, _open(other, console))
        elif self.compare:
            opened = systems[0].opened
            systems.insert(0, _System(_BASE, opened, opened.sampler(adapted=False)))
        self._answer_all(systems, console)

    def _answer_all(self, systems: "Sequence[_System]", console: "Console") -> None:
        from rich.rule import Rule

        from gemma2_grpo.run.console import inert

        for asked in _questions(console) if self.question is None else [self.question]:
            try:
                for system in systems:
                    _check_question(system.opened, asked)
            except UserError as error:
                if self.question is not None or not sys.stdin.isatty():
                    raise
                console.print(f"{error}\n", markup=False)  # The next one may be shorter.
                continue
            for system in systems:
                if len(systems) > 1:
                    console.print(Rule(inert(system.title), align="left", style="dim"))
                _answer(system.sample, asked, self.samples, self.seed, console)


class _System(NamedTuple):
    """A model that answers."""

    title: str
    opened: "Opened"
    sample: "Sample"


def _start(source: "Source", console: "Console") -> None:
    """Starts JAX and the cache of its programs, once for all models."""
    from gemma2_grpo.run.console import inert
    from gemma2_grpo.runtime.devices import start_jax

    start_jax(lambda text: console.print(inert(text)))
    from gemma2_grpo.runtime.program_cache import use_program_cache

    use_program_cache(source.config.run.compilation_cache, console.print)


def _open(source: "Source", console: "Console") -> _System:
    """Loads a model, with the adapters if it has any."""
    from gemma2_grpo.run.console import inert
    from gemma2_grpo.run.source import open_source

    with console.status(f"loading {inert(source.title)}"):
        opened = open_source(source)
    title = f"{source.title}, after {opened.steps} steps" if opened.steps else source.title
    return _System(title, opened, opened.sampler(adapted=True))


def _check_question(opened: "Opened", question: str) -> None:
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError("the question is not UTF-8; write it in the terminal's encoding") from None
    tokens = len(opened.files.tokenizer.encode(render_prompt(question)))
    limit = opened.config.rollout.max_prompt_tokens
    if tokens > limit:
        raise UserError(
            f"the question takes {tokens} tokens with its instruction, and {limit} fit; shorten it"
        )


def _questions(console: "Console") -> Iterator[str]:
    """Questions as they are typed or piped in, until an empty line or the end."""
    while True:
        try:
            line = console.input(_QUESTION) if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line.strip():
            return
        yield line.strip()


def _answer(sample: "Sample", question: str, samples: int, seed: int, console: "Console") -> None:
    """Streams one completion; of several, the first, and then how all of them voted."""
    import jax

    prompts, key = [render_prompt(question)], jax.random.key(seed)
    with _Stream(console) as stream:
        completions = sample(prompts, samples, key, greedy=samples == 1, on_text=stream.show)
        stream.show(completions.texts[0])
    if completions.is_truncated[0]:
        console.print("cut off at max_completion_tokens", style="yellow")
    if samples > 1:
        console.print(f"{vote_line(completions.texts)}; the first is shown")
    console.print()


class _Stream:
    """Prints lines once they are whole; on a terminal the last one is seen while it is written."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live
        from rich.text import Text

        self._console = console
        self._live = Live(console=console, transient=True) if console.is_terminal else None
        self._printed = 0
        self._last = Text()

    def __enter__(self) -> "_Stream":
        if self._live:
            self._live.start()
        return self

    def show(self, text: str) -> None:
        """Takes the completion as far as it has come."""
        from gemma2_grpo.run.console import render_completion

        *whole, self._last = render_completion(text)
        for line in whole[self._printed :]:
            self._console.print(line)
        self._printed = len(whole)
        if self._live:
            self._live.update(self._last)

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._console.print(self._last)


def vote_line(completions: Sequence[str]) -> str:
    """Counts of the numbers that completions gave, most frequent first."""
    from gemma2_grpo.task.answers import extract_number, printable

    numbers = [extract_number(parse_completion(text).answer or "") for text in completions]
    votes = Counter("no number" if n is None else printable(n) for n in numbers)
    counts = ", ".join(f"{answer} x {count}" for answer, count in votes.most_common())
    return f"votes of {len(completions)} samples: {counts}"
