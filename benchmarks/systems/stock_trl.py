"""Hugging Face TRL: `GRPOTrainer` with transformers' own generation, on the CPU."""

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.session import Scorer, Session
from benchmarks.tokens import SPECIAL_TOKENS
from benchmarks.workload import Batch

LORA_MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def run(session: Session) -> Scorer:
    """Makes the steps of a session."""
    for name in ("datasets", "peft", "transformers", "trl.trainer.grpo_trainer"):
        importlib.import_module(name)
    session.imported()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _build(session, folder)
        _force_lengths(session, trainer)
        # The first calls the second, and makes the passes for log-probabilities itself.
        scored = session.measured("reference", trainer._generate_and_score_completions)
        trainer._generate_and_score_completions = scored
        trainer._generate = session.measured("rollout", _counted(session, trainer._generate))
        pace = _pace(session)
        trainer.add_callback(pace)
        trainer.train()
        pace.finish()
    return partial(_score, trainer)


def _build(session: Session, folder: str) -> Any:
    """The trainer."""
    from datasets import Dataset
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

    workload = session.workload
    sizes, directory = workload.sizes, workload.directory

    def reward(completions: list[str], **_: Any) -> list[float]:
        assert len(completions) == sizes.rows
        return list(session.batch.rewards)

    # Eager attention is what transformers advises for training Gemma 2: it has the soft cap.
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=sizes.dtype, attn_implementation="eager"
    )
    prompts = [text for step in range(workload.steps) for text in workload.batch(step).prompts]
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=_arguments(session, folder),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"),
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
        ),
        peft_config=LoraConfig(
            r=sizes.lora_rank,
            lora_alpha=sizes.lora_rank,
            target_modules=list(LORA_MODULES),
            task_type="CAUSAL_LM",
        ),
    )


def _arguments(session: Session, folder: str) -> Any:
    from trl import GRPOConfig  # pyright: ignore[reportMissingImports]

    sizes = session.workload.sizes
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=sizes.rows,
        gradient_accumulation_steps=1,
        num_generations=sizes.generations,
        num_iterations=sizes.iterations,
        max_steps=session.workload.steps * sizes.iterations,
        max_completion_length=sizes.max_completion_tokens,
        learning_rate=sizes.learning_rate,
        beta=sizes.beta,
        epsilon=sizes.epsilon,
        loss_type="grpo",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # An id that ends a row early or pads it must not be drawn: lengths are forced.
        generation_kwargs={"suppress_tokens": list(range(len(SPECIAL_TOKENS)))},
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=sizes.dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=session.workload.seed,
    )


def _pace(session: Session) -> Any:
    """A callback that begins and ends a step where the trainer begins and ends its iterations."""
    from transformers import TrainerCallback

    iterations = session.workload.sizes.iterations

    class Pace(TrainerCallback):
        """Waits for the parent before the first iteration of each step."""

        def __init__(self) -> None:
            self._steps: Iterator[Batch] = session.steps()
            self._update = ExitStack()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            del args, control
            if state.global_step % iterations == 0:
                self.finish()
                # The optimizer is outside of any method that could be wrapped: what is neither
                # rollout nor reference is the update.
                self._update.enter_context(session.phase("update"))

        def finish(self) -> None:
            """Ends the step that is under way, if any, and waits for the next."""
            self._update.close()
            next(self._steps, None)

    return Pace()


def _force_lengths(session: Session, trainer: Any) -> None:
    """Makes completions as long as the batch says, by a stopping criterion for each row.

    Generation then pads the row, as it does after an end token. The end token itself, by which
    the trainer finds where a completion ends, is put at the end of each row afterwards.
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    generate = trainer.model.generate

    class Limits(StoppingCriteria):
        """True for rows that have their tokens."""

        def __init__(self, prompt_tokens: int) -> None:
            self._ends = prompt_tokens + torch.tensor(session.batch.limits)

        def __call__(self, input_ids: Any, _: Any, **__: Any) -> Any:
            return input_ids.shape[1] >= self._ends

    def forced(*args: Any, **kwargs: Any) -> Any:
        width = kwargs["input_ids"].shape[1]
        criteria = StoppingCriteriaList([Limits(width)])
        ids = generate(*args, stopping_criteria=criteria, **kwargs)
        ends = width + torch.tensor(session.batch.limits) - 1
        ids[torch.arange(len(ids)), ends] = trainer._tokenizer.eos_token_id
        return ids

    trainer.model.generate = forced


def _counted(session: Session, generate: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        session.completion_tokens = sum(len(ids) for ids in result[1])
        return result

    return counted


def _score(trainer: Any, prompt: str, ids: Any) -> Sequence[float]:
    import torch

    prompt_ids = trainer._tokenizer(prompt)["input_ids"]
    tokens = torch.tensor([[*prompt_ids, *ids]])
    with torch.no_grad(), trainer.model.disable_adapter():
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, tokens, torch.ones_like(tokens), len(ids)
        )
    return logps[0].tolist()
