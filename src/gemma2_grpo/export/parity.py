"""Compares an exported model with the policy it was made from, by way of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tunix.models.gemma import model as gemma

from gemma2_grpo.errors import first_line
from gemma2_grpo.model.chat_template import user_turn
from gemma2_grpo.model.gemma import Network, Weights, run_from_start, split_model
from gemma2_grpo.model.logprobs import output_logits
from gemma2_grpo.model.mesh import on_mesh
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.task.prompts import render_prompt


@dataclass(frozen=True)
class Agreement:
    """Of the logits of two models on the same tokens, both computed in float32."""

    texts: int
    tokens: int
    largest: float
    """Largest difference of any logit."""
    mean: float
    """Mean difference of the logits, signs left out."""
    same_choice: float
    """Share of tokens after which both find the same next token likeliest."""


def compare_with_transformers(
    policy: gemma.Gemma,
    mesh: Mesh,
    tokenizer: Tokenizer,
    folder: Path,
    texts: Sequence[str],
    *,
    base: Path | None = None,
) -> Agreement:
    """Runs an exported model on the CPU in transformers, and the policy here.

    Args:
        policy: What was exported, its base in float32.
        mesh: Where it lies.
        tokenizer: Of the policy.
        folder: The export.
        texts: What both read, special tokens included.
        base: Directory of the base if the export is an adapter for PEFT.

    Raises:
        ValueError: if transformers splits a text into other tokens.
    """
    model = _load_with_transformers(folder, base)
    rows = [tokenizer.encode(text) for text in texts]
    _check_tokens(folder, texts, rows)
    network, weights = split_model(policy)
    longest = max(map(len, rows))
    largest, total, same = 0.0, 0.0, 0
    for row in rows:
        # Padding comes last, where no real token sees it; so one program serves all rows.
        padded = np.pad(row, (0, longest - len(row)), constant_values=tokenizer.pad)[None]
        # TPUs and GPUs multiply float32 in fewer bits unless they are told not to.
        with on_mesh(mesh), jax.default_matmul_precision("highest"):
            ours = np.asarray(_logits(network, weights, jnp.asarray(padded)))[0, : len(row)]
        theirs = _transformers_logits(model, row)
        difference = abs(ours - theirs)
        largest = max(largest, float(difference.max()))
        total += float(difference.mean(axis=1, dtype=np.float64).sum())
        same += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    tokens = sum(map(len, rows))
    return Agreement(len(rows), tokens, largest, total / tokens, same / tokens)


@partial(jax.jit, static_argnames="network")
def _logits(network: Network, weights: Weights, tokens: jax.Array) -> jax.Array:
    hidden, _ = run_from_start(network, weights, tokens)
    return output_logits(network, weights, hidden)


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


def _transformers_logits(model: Any, row: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].numpy()


def check_chat(folder: Path, tokenizer: Tokenizer, questions: Sequence[str]) -> None:
    """Compares the prompts that an export's chat template makes with those of the run.

    Args:
        folder: The export.
        tokenizer: Of the run.
        questions: What is asked, each in one turn after the instruction.

    Raises:
        ValueError: if transformers gives one of them other tokens.
    """
    theirs = _load_tokenizer(folder)
    for question in questions:
        made = theirs.apply_chat_template(
            user_turn(question), add_generation_prompt=True, return_dict=True
        )
        if made["input_ids"] != tokenizer.encode(render_prompt(question)):
            raise ValueError(
                f"the chat template gives transformers another prompt for {question[:40]!r} than "
                "the run was trained on"
            )


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
