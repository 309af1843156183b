"""What the model is asked, and the form its answer must have."""

REASONING_START, REASONING_END = "<reasoning>", "</reasoning>"
ANSWER_START, ANSWER_END = "<answer>", "</answer>"

INSTRUCTION = (
    "Solve the problem step by step. Write your reasoning between "
    f"{REASONING_START} and {REASONING_END}, one step a line, with every calculation as an "
    f"equation. Then write the final answer, a single number, between {ANSWER_START} and "
    f"{ANSWER_END}."
)

# Generation ends at either; Gemma's chat turns end with the first.
STOP_TOKENS = ("<end_of_turn>", "<eos>")


def render_prompt(question: str) -> str:
    """Renders Gemma's chat template for one question, up to where the model answers.

    Source: the chat template of google/gemma-2-2b-it, which has no system turn.
    """
    return (
        f"<bos><start_of_turn>user\n{INSTRUCTION}\n\n{question.strip()}<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


def render_solution(steps: list[str], answer: str) -> str:
    """Renders a worked solution in the form the model is taught."""
    reasoning = "\n".join(steps)
    return (
        f"{REASONING_START}\n{reasoning}\n{REASONING_END}\n{ANSWER_START}\n{answer}\n{ANSWER_END}"
    )
