"""docs/scaling.md shows what the command prints. As a program, this puts it there."""

import re
import shlex
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from gemma2_grpo import cli

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
_RECIPE = re.compile(r"```sh\n(gemma2-grpo launch .*)\n```\n\n```(bash|yaml)\n((?:.*\n)*?)```\n")


def _print(command: str) -> str:
    output = StringIO()
    with redirect_stdout(output):
        assert cli.main(shlex.split(command)[1:]) == 0
    return output.getvalue()


def _renewed(page: str, run: Callable[[str], str]) -> str:
    return _RECIPE.sub(lambda m: f"```sh\n{m[1]}\n```\n\n```{m[2]}\n{run(m[1])}```\n", page)


def test_recipes_are_what_the_command_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tools = {re.findall(r"launch (\w+)", match[1])[0] for match in _RECIPE.finditer(page)}
    assert tools == {"xpk", "jobset", "slurm", "skypilot"}
    assert page.count("gemma2-grpo launch ") == len(_RECIPE.findall(page))
    assert page == _renewed(page, _print), f"run: python {Path(__file__).name}"


if __name__ == "__main__":
    PAGE.write_text(_renewed(PAGE.read_text(encoding="utf-8"), _print), encoding="utf-8")
