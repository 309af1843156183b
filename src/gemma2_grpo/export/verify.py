"""Running an export in transformers, beside the policy it was made from."""

import importlib.util
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gemma2_grpo.errors import UserError
from gemma2_grpo.run.source import Opened
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import render_prompt

if TYPE_CHECKING:  # What is not installed is told before JAX has loaded.
    from gemma2_grpo.model.tokenizer import Tokenizer

NOT_VERIFIED = (
    "Every tensor was read back after writing, and has its shape and finite values. This export "
    "was not run in transformers itself, as `gemma2-grpo export --verify always` would have done; "
    "the tests of gemma2-grpo run exports of both formats there, and find float32 logits within "
    "1e-4 of the policy's."
)
"""What a card says of an export that was not verified."""

Verify = Literal["auto", "always", "never"]

# Between float32 weights only the order of sums differs; bfloat16 rounds the weights.
_LARGEST_DIFFERENCE = 5e-3
_SAME_CHOICE = 0.9
_TEXTS = 8
# Two models in float32, and as much again for what transformers does while it loads.
_BYTES_PER_PARAMETER = 12
_PACKAGES = {"merged": ("torch", "transformers"), "peft": ("torch", "transformers", "peft")}


def check_packages(format: str) -> None:  # noqa: A002 (that of the option)
    """Refuses to verify without the libraries that are compared with.

    Raises:
        UserError: naming those that are missing.
    """
    if missing := _missing(format):
        raise UserError(
            f"--verify always needs {', '.join(missing)}; pip install "
            "'gemma2-grpo-reasoning[oracle]', or leave it out"
        )


def _missing(format: str) -> list[str]:  # noqa: A002
    return [name for name in _PACKAGES[format] if importlib.util.find_spec(name) is None]


def obstacle(format: str, parameters: int) -> str | None:  # noqa: A002
    """Why an export is not verified without being asked to; None where it is.

    Args:
        format: `merged` or `peft`.
        parameters: Of the whole model.
    """
    import jax

    from gemma2_grpo.model.pretrained import available_bytes

    if missing := _missing(format):
        return f"{', '.join(missing)} not installed"
    if jax.default_backend() != "cpu":
        return "on an accelerator only with --verify always"
    needed, free = _BYTES_PER_PARAMETER * parameters, available_bytes()
    if needed > free:
        return f"it takes {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    return None


def check_prompts(folder: Path, tokenizer: "Tokenizer") -> None:
    """Checks that the snippet of a card gives the model the prompts that it was trained on.

    Where transformers is not installed nothing is checked.

    Args:
        folder: The export.
        tokenizer: Of the run.

    Raises:
        UserError: if transformers makes other prompts of the same questions.
    """
    if importlib.util.find_spec("transformers") is None:
        return
    from gemma2_grpo.export.parity import check_chat

    try:
        check_chat(folder, tokenizer, [problem.question for problem in generate("test", _TEXTS, 0)])
    except ValueError as error:
        raise UserError(f"{error}; nothing was written") from None


def verify_export(folder: Path, opened: Opened, format: str, dtype: str) -> str:  # noqa: A002
    """Compares an export with its policy on prompts with worked solutions.

    Args:
        folder: The export.
        opened: What it was made from, the base in float32.
        format: `merged` or `peft`.
        dtype: Type that is stored.

    Returns:
        What the card says of it.

    Raises:
        UserError: if the two do not agree.
    """
    from gemma2_grpo.export.parity import compare_with_transformers

    assert opened.policy is not None  # A run has one.
    problems = generate("test", _TEXTS, 0)
    texts = [render_prompt(problem.question) + problem.solution for problem in problems]
    base = opened.directory if format == "peft" else None
    try:
        found = compare_with_transformers(
            opened.policy, opened.mesh, opened.tokenizer, folder, texts, base=base
        )
    except ValueError as error:
        raise UserError(f"{error}; nothing was written") from None
    measured = (
        f"logits differ by at most {found.largest:.1e} ({found.mean:.1e} in the mean), and the "
        f"likeliest next token is the same after {100 * found.same_choice:.1f} % of "
        f"{found.tokens} tokens"
    )
    if dtype == "float32":
        agrees = found.largest <= _LARGEST_DIFFERENCE
        allowed = f"differences of up to {_LARGEST_DIFFERENCE:.0e}"
    else:
        agrees = found.same_choice >= _SAME_CHOICE
        allowed = f"another token after up to {100 * (1 - _SAME_CHOICE):.0f} %"
    if not agrees:
        raise UserError(
            f"transformers does not compute what the run does: {measured}; nothing was "
            "written, please report it"
        )
    return (
        f"This export was run in transformers {metadata.version('transformers')} on the CPU, "
        f"beside the policy of the run, both computing in float32, on {found.texts} prompts with "
        f"worked solutions: {measured}. The check allows {allowed}."
    )
