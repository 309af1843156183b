"""Asking a model a question: the answer as it comes, by tag, with its equations checked."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from gemma2_grpo.config import EvaluateConfig, check_evaluate
from gemma2_grpo.errors import UserError
from gemma2_grpo.run.console import inert, open_console, render_completion
from gemma2_grpo.run.source import Opened, Source, as_asked, find_source, open_source
from gemma2_grpo.runtime.devices import start_jax
from gemma2_grpo.task.answers import extract_number, printable
from gemma2_grpo.task.prompts import parse_completion, render_prompt

if TYPE_CHECKING:
    from gemma2_grpo.sampling.sampler import Sampler

_QUESTION = "question> "


def ask(
    name: str,
    question: str | None,
    *,
    samples: int = 1,
    compare: bool = False,
    temperature: float | None = None,
    max_completion_tokens: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> None:
    """Answers one question, or each that is typed until an empty line.

    Args:
        name: A run directory, a model directory, a hub id, or `embedded`.
        question: The question; None to ask for it.
        samples: 1 takes the likeliest token each time; more are sampled, and vote.
        compare: Show the answer of the base beside it.
        temperature: Of the samples; by default that of the run.
        max_completion_tokens: By default that of the run.
        seed: Of the samples.
        console: Where to print.

    Raises:
        UserError: for anything that the user can mend.
    """
    console = console or open_console()
    if samples < 1:
        raise UserError(f"samples = {samples} must be at least 1")
    if question is not None and not question.strip():
        raise UserError("the question is blank; write it in quotes, or leave it out to be asked")
    asked_for = EvaluateConfig(
        temperature=temperature, max_completion_tokens=max_completion_tokens, seed=seed
    )
    source = as_asked(find_source(name), check_evaluate(asked_for))
    if compare and source.run is None and not source.config.model.adapter:
        raise UserError(f"{name} is a base model; --compare needs a run, whose base it shows")
    opened = _open(source, console)
    for asked in _questions(console) if question is None else [question]:
        try:
            _check_question(opened, asked)
        except UserError as error:
            if question is not None or not sys.stdin.isatty():
                raise
            console.print(f"{error}\n", markup=False)  # The next one may be shorter.
            continue
        if compare:
            console.print(Rule("base", align="left", style="dim"))
            _answer(opened.sampler(adapted=False), asked, samples, seed, console)
            console.print(Rule(f"after {opened.steps} steps", align="left", style="dim"))
        _answer(opened.sampler(adapted=True), asked, samples, seed, console)


def _open(source: Source, console: Console) -> Opened:
    start_jax(lambda text: console.print(inert(text)))
    from gemma2_grpo.runtime.program_cache import use_program_cache

    use_program_cache(source.config.run.compilation_cache, console.print)
    with console.status(f"loading {inert(source.title)}"):
        return open_source(source)


def _check_question(opened: Opened, question: str) -> None:
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError("the question is not UTF-8; write it in the terminal's encoding") from None
    tokens = len(opened.tokenizer.encode(render_prompt(question)))
    limit = opened.config.rollout.max_prompt_tokens
    if tokens > limit:
        raise UserError(
            f"the question takes {tokens} tokens with its instruction, and {limit} fit; shorten it"
        )


def _questions(console: Console) -> Iterator[str]:
    """Questions as they are typed or piped in, until an empty line or the end."""
    while True:
        try:
            line = console.input(_QUESTION) if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line.strip():
            return
        yield line.strip()


def _answer(sampler: "Sampler", question: str, samples: int, seed: int, console: Console) -> None:
    """Streams one completion; of several, the first, and then how all of them voted."""
    import jax

    prompts, key = [render_prompt(question)], jax.random.key(seed)
    with _Stream(console) as stream:
        completions = sampler.generate(
            prompts, samples, key, greedy=samples == 1, on_text=stream.show
        )
        stream.show(completions.texts[0])
    if completions.is_truncated[0]:
        console.print("cut off at max_completion_tokens", style="yellow")
    if samples > 1:
        console.print(f"{vote_line(completions.texts)}; the first is shown")
    console.print()


class _Stream:
    """Prints lines once they are whole; on a terminal the last one is seen while it is written."""

    def __init__(self, console: Console) -> None:
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
    """How many completions gave each number, most first."""
    numbers = [extract_number(parse_completion(text).answer or "") for text in completions]
    votes = Counter("no number" if n is None else printable(n) for n in numbers)
    counts = ", ".join(f"{answer} x {count}" for answer, count in votes.most_common())
    return f"votes of {len(completions)} samples: {counts}"
