"""Running an export in transformers, and comparing it with the policy it was made from."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gemma2_grpo.errors import UserError, first_line
from gemma2_grpo.run.source import Opened
from gemma2_grpo.runtime.memory import available_bytes
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import render_prompt

if TYPE_CHECKING:  # Missing packages are reported before JAX loads.
    from gemma2_grpo.model.open import ModelFiles
    from gemma2_grpo.model.tokenizer import Tokenizer
    from gemma2_grpo.model.weights import Model

NOT_VERIFIED = (
    "Every tensor was read back after writing, and has its shape and finite values. This export "
    "was not run in transformers itself, as `gemma2-grpo export --verify always` would have done; "
    "the tests of gemma2-grpo run exports of both formats there, and find float32 logits within "
    "1e-4 of the policy's."
)
"""Sentence of the model card for an export that was not verified."""

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
        parameters: Parameters of the whole model.
    """
    import jax

    if missing := _missing(format):
        return f"{', '.join(missing)} not installed"
    if jax.default_backend() != "cpu":
        return "on an accelerator only with --verify always"
    needed, free = _BYTES_PER_PARAMETER * parameters, available_bytes()
    if needed > free:
        return f"it takes {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    return None


@contextmanager
def _refused() -> Iterator[None]:
    """Turns what does not agree into an error of the export."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{error}; nothing was written") from None


def check_prompts(folder: Path, tokenizer: "Tokenizer") -> None:
    """Checks that the chat template of an export makes the prompts that the run was trained on.

    Where transformers is not installed nothing is checked.

    Raises:
        UserError: if transformers makes other prompts of the same questions.
    """
    if importlib.util.find_spec("transformers") is None:
        return
    from gemma2_grpo.model.chat_template import user_turn

    with _refused():
        theirs = _load_tokenizer(folder)
        for problem in generate("test", _TEXTS, 0):
            made = theirs.apply_chat_template(
                user_turn(problem.question), add_generation_prompt=True, return_dict=True
            )
            if made["input_ids"] != tokenizer.encode(render_prompt(problem.question)):
                raise ValueError(
                    f"the chat template gives transformers another prompt for "
                    f"{problem.question[:40]!r} than the run was trained on"
                )


def verify_export(folder: Path, opened: Opened, format: str, dtype: str) -> str:  # noqa: A002
    """Compares an export with its policy on prompts with worked solutions.

    Args:
        folder: The export.
        opened: Run or model that was exported, the base in float32.
        format: `merged` or `peft`.
        dtype: Type that is stored.

    Returns:
        What the card says of it.

    Raises:
        UserError: if the two do not agree.
    """
    assert opened.policy is not None  # A run has one.
    problems = generate("test", _TEXTS, 0)
    texts = [render_prompt(problem.question) + problem.solution for problem in problems]
    base = opened.files.directory if format == "peft" else None
    with _refused():
        found = compare_with_transformers(opened.policy, opened.files, folder, texts, base=base)
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
        f"compared with the policy of the run, both in float32, on {found.texts} prompts with "
        f"worked solutions: {measured}. The check allows {allowed}."
    )


@dataclass(frozen=True)
class Agreement:
    """Agreement of the logits of two models on the same tokens, both in float32."""

    texts: int
    tokens: int
    largest: float
    """Largest difference of any logit."""
    mean: float
    """Mean difference of the logits, signs left out."""
    same_choice: float
    """Share of tokens after which both find the same next token likeliest."""


def compare_with_transformers(
    policy: "Model",
    files: "ModelFiles",
    folder: Path,
    texts: Sequence[str],
    *,
    base: Path | None = None,
) -> Agreement:
    """Runs an exported model on the CPU in transformers, and the policy here.

    Args:
        policy: Exported policy, its base in float32.
        files: The files of its base.
        folder: The export.
        texts: Input of both, special tokens included.
        base: Directory of the base if the export is an adapter for PEFT.

    Raises:
        ValueError: if transformers splits a text into other tokens.
    """
    import jax
    import jax.numpy as jnp
    import torch

    from gemma2_grpo.model.gemma import run_from_start
    from gemma2_grpo.model.logprobs import output_logits
    from gemma2_grpo.model.weights import Forward, Weights, split_model

    @partial(jax.jit, static_argnames="forward")
    def logits(forward: Forward, weights: Weights, tokens: jax.Array) -> jax.Array:
        hidden, _ = run_from_start(forward, weights, tokens)
        return output_logits(forward, weights, hidden)

    model = _load_with_transformers(folder, base)
    rows = [files.tokenizer.encode(text) for text in texts]
    _check_tokens(folder, texts, rows)
    forward, weights = split_model(policy)
    longest = max(map(len, rows))
    largest, total, same = 0.0, 0.0, 0
    for row in rows:
        # Padding comes last, where no real token sees it; so one program serves all rows.
        padded = np.pad(row, (0, longest - len(row)), constant_values=files.tokenizer.pad)[None]
        # TPUs and GPUs multiply float32 in fewer bits unless they are asked not to.
        with jax.default_matmul_precision("highest"):
            ours = np.asarray(logits(forward, weights, jnp.asarray(padded)))[0, : len(row)]
        with torch.no_grad():
            theirs = model(torch.tensor([row])).logits[0].numpy()
        difference = abs(ours - theirs)
        largest = max(largest, float(difference.max()))
        total += float(difference.mean(axis=1, dtype=np.float64).sum())
        same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    tokens = sum(map(len, rows))
    return Agreement(len(rows), tokens, largest, total / tokens, same / tokens)


def _load_with_transformers(folder: Path, base: Path | None) -> Any:
    """The exported model; with eager attention, because others leave out Gemma 2's soft cap."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base or folder, dtype=torch.float32, attn_implementation="eager"
    )
    if base:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder))
    return model.eval()


def _check_tokens(folder: Path, texts: Sequence[str], rows: list[list[int]]) -> None:
    theirs = _load_tokenizer(folder)
    for text, row in zip(texts, rows, strict=True):
        if theirs(text, add_special_tokens=False).input_ids != row:
            raise ValueError(f"transformers splits {text[:40]!r} into other tokens than the run")


def _load_tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # Each of its tokenizers raises errors of its own.
        raise ValueError(
            f"transformers {transformers.__version__} cannot load the tokenizer "
            f"({first_line(error)})"
        ) from None
