"""Scores of a batch of completions: our components, and a user's own reward if there is one."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_grpo.config import RewardConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.rewards import COMPONENTS, component_weights, score_completion
from gemma2_grpo.task.siblings import Siblings

Reward = Callable[[list[str], list[str], list[str]], Sequence[float | None]]
"""A user's reward: (questions, completions, answers) -> one number, or None, per completion."""


@dataclass(frozen=True)
class Scorer:
    """Scores completions by the configured weights, plus a user's own reward."""

    weights: RewardConfig
    reward: Reward | None = None

    def __post_init__(self) -> None:
        """Refuses weights of components that there are not, before anything is sampled."""
        component_weights(self.weights)

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        is_truncated: Sequence[bool] | np.ndarray | None = None,
    ) -> Mapping[str, np.ndarray]:
        """Scores completions, aligned with their examples.

        Returns:
            Float64 arrays [N] by name: each component in [0, 1] before its weight; `total`, what
            is trained on, NaN where the user's reward gave none; `correct` and
            `official_correct` by our grader and GSM8K's; `equations` and `true_equations`, how
            many were written and how many of them hold.
        """
        cuts = [False] * len(completions) if is_truncated is None else is_truncated
        scores = [
            score_completion(
                text, example.answer, example.question, self.weights, is_truncated=bool(cut)
            )
            for example, text, cut in zip(examples, completions, cuts, strict=True)
        ]
        table = {n: np.array([s[n] for s in scores], np.float64) for n in COMPONENTS}
        for name in ("correct", "official_correct", "total"):
            table[name] = np.array([getattr(s, name) for s in scores], np.float64)
        table["equations"] = np.array([len(s.equations) for s in scores], np.float64)
        table["true_equations"] = np.array(
            [sum(e.is_true for e in s.equations) for s in scores], np.float64
        )
        if self.reward is not None:
            table["custom"] = self._custom(self.reward, examples, completions)
            table["total"] = table["total"] + self.weights.reward_weight * table["custom"]
        return table

    def _custom(
        self, reward: Reward, examples: Sequence[Example], completions: Sequence[str]
    ) -> np.ndarray:
        """Rewards of the user's function, in float64 [N]."""
        # A partial or an object with __call__ has no name of its own.
        name = f"reward {self.weights.reward or getattr(reward, '__name__', repr(reward))}"
        questions, answers = [e.question for e in examples], [e.answer for e in examples]
        try:
            # Copies: what the function does to its arguments must not change what is trained on.
            values = reward(questions, list(completions), answers)
        # Whatever the user's function raises is the user's to fix, also if it ends the process:
        # where several train, the others would wait for it.
        except (Exception, SystemExit) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{name}: raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            ) from error
        return check_rewards(values, len(completions), name)


def check_rewards(values: Any, expected: int, name: str = "reward") -> np.ndarray:
    """Turns what a reward function returned into float64 [N], NaN where it gave none.

    Tunix takes NaN and None for 0 and spreads a single number over the batch; here an unscored
    completion is left out, and a result of another length or kind is an error.

    Raises:
        UserError: if the result is not one finite number or None per completion.
    """
    fix = f"return one finite number, or None if unscorable, for each of {expected} completions"
    is_array = getattr(values, "ndim", 0) == 1  # NumPy's and JAX's; those of no axis have a len.
    if not is_array and not isinstance(values, list | tuple):
        raise UserError(f"{name}: returned {_describe(values)}; {fix}")
    if len(values) != expected:
        raise UserError(f"{name}: returned {len(values)} values; {fix}")
    rewards = np.full(expected, np.nan)
    for i, value in enumerate(values):
        if value is None:
            continue
        try:
            rewards[i] = np.inf if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            rewards[i] = np.inf
        if np.isinf(rewards[i]):
            raise UserError(f"{name}: value {i} is {value!r}; {fix}")
    return rewards


def _describe(values: object) -> str:
    shape = getattr(values, "shape", None)
    return type(values).__name__ if shape is None else f"an array of shape {shape}"


def load_reward(spec: str) -> tuple[Reward, str]:
    """Loads `path.py:function`. This runs the file: it is trusted code.

    The file may import what is next to it, when it is loaded and whenever the function is called.

    Returns:
        The function and the SHA-256 of its file and of what that imports from its folder.

    Raises:
        UserError: if there is no such file or function, or it does not load.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise UserError(f"reward = {spec!r}: no such file; write path/to/file.py:function")
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"reward = {spec!r}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # Dataclasses look their own module up there.
    siblings = Siblings(path)
    try:
        with siblings.importable():
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # Whatever it raises, the user has to fix it.
        raise UserError(f"reward = {spec!r}: {type(error).__name__}: {error}") from error
    function: Reward | None = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward = {spec!r}: {path} has no function {name!r}")

    def reward(*columns: list[str]) -> Sequence[float | None]:
        with siblings.importable():
            return function(*columns)

    return reward, siblings.sha256()
