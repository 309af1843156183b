"""What the completions of an evaluation say: pure functions of their records.

A record is one line of evaluation_completions.jsonl: system, index of the problem, number of the
sample (None for the greedy completion), completion, tokens, truncated, and columns of scores.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gemma2_grpo.task.answers import extract_number
from gemma2_grpo.task.examples import Example
from gemma2_grpo.task.prompts import parse_completion
from gemma2_grpo.task.statistics import (
    compare_paired,
    interval_over_problems,
    majority_at_k,
    pass_at_k,
    powers_up_to,
    wilson_interval,
)

BASE, ADAPTER = "base", "adapter"

Record = Mapping[str, Any]


def summarize(records: Iterable[Record], examples: Sequence[Example]) -> dict[str, Any]:
    """Statistics of each system, and how their greedy answers to the same problems differ.

    Args:
        records: Of all completions, those of each system in the order of problems and samples.
        examples: The problems, which the records have by index.

    Returns:
        `systems` by name, and `comparison`, None with one system only.
    """
    greedy: dict[str, list[Record]] = {}
    sampled: dict[str, list[Record]] = {}
    for record in records:
        kind = greedy if record["sample"] is None else sampled
        kind.setdefault(record["system"], []).append(record)
    systems = {
        system: {
            "greedy": summarize_greedy(greedy[system], examples),
            "sampled": summarize_sampled(sampled[system], examples) if sampled else None,
        }
        for system in greedy
    }
    return {"systems": systems, "comparison": _comparison(greedy)}


def summarize_greedy(records: Sequence[Record], examples: Sequence[Example]) -> dict[str, Any]:
    """Statistics of one greedy completion per problem."""
    correct, official = _count(records, "correct"), _count(records, "official_correct")
    return {
        "problems": len(records),
        "correct": correct,
        "accuracy": correct / len(records),
        "interval": list(wilson_interval(correct, len(records))),
        "official_correct": official,
        "official_accuracy": official / len(records),
        **_form(records),
        "by_solution_steps": _by_solution_steps(records, examples),
    }


def summarize_sampled(records: Sequence[Record], examples: Sequence[Example]) -> dict[str, Any]:
    """Statistics of several samples of each problem, as many of one as of another."""
    samples = len(records) // len(examples)
    groups = [records[i : i + samples] for i in range(0, len(records), samples)]
    correct = [_count(group, "correct") for group in groups]
    votes = [
        ([_number_in(record["completion"]) for record in group], extract_number(example.answer))
        for group, example in zip(groups, examples, strict=True)
    ]
    told = powers_up_to(samples)
    return {
        "samples": samples,
        "pass_at_1": pass_at_k(correct, samples, 1),
        "interval": list(interval_over_problems(correct, samples)),
        "pass_at_k": {str(k): pass_at_k(correct, samples, k) for k in told},
        "maj_at_k": {
            str(k): _mean([majority_at_k(answers, right, k) for answers, right in votes])
            for k in told
        },
        **_form(records),
        "reward": _mean([record["total"] for record in records]),
    }


def _form(records: Sequence[Record]) -> dict[str, float]:
    """What completions look like, right or wrong."""
    equations = sum(record["equations"] for record in records)
    return {
        "format": _mean([record["format"] == 1 for record in records]),
        "true_equations": sum(record["true_equations"] for record in records) / max(equations, 1),
        "truncated": _mean([record["truncated"] for record in records]),
        "mean_tokens": _mean([record["tokens"] for record in records]),
    }


def _by_solution_steps(
    records: Sequence[Record], examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Accuracy by the steps of the gold solution, where the source has one."""
    problems, correct = Counter[int](), Counter[int]()
    for record in records:
        steps = examples[record["index"]].solution_steps
        if steps is not None:
            problems[steps] += 1
            correct[steps] += int(record["correct"])
    return [
        {
            "steps": steps,
            "problems": count,
            "correct": correct[steps],
            "accuracy": correct[steps] / count,
            "interval": list(wilson_interval(correct[steps], count)),
        }
        for steps, count in sorted(problems.items())
    ]


def _comparison(greedy: Mapping[str, Sequence[Record]]) -> dict[str, Any] | None:
    if ADAPTER not in greedy:
        return None
    before, after = ([bool(r["correct"]) for r in greedy[name]] for name in (BASE, ADAPTER))
    paired = compare_paired(before, after)
    return {**asdict(paired), "p_value": paired.p_value}


def _number_in(completion: str) -> Any:
    """What a completion votes for: the number in its answer block; None where there is none."""
    return extract_number(parse_completion(completion).answer or "")


def _count(records: Sequence[Record], name: str) -> int:
    return sum(int(record[name]) for record in records)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
