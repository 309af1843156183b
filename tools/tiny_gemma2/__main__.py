"""Makes the embedded model: python -m tools.tiny_gemma2 --to DIR."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma2_grpo.errors import UserError
from tools.tiny_gemma2.lessons import tiny_phases
from tools.tiny_gemma2.tokenizer import make_config, make_tokenizer
from tools.tiny_gemma2.training import Recipe, train


def make(to: Path, recipe: Recipe) -> None:
    """Writes tokenizer and architecture, and trains the model on them from random weights."""
    with TemporaryDirectory() as folder:
        make_config(Path(folder), make_tokenizer(Path(folder)))
        train(replace(recipe, model=replace(recipe.model, model=folder)), tiny_phases, to)


def main() -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser("tools.tiny_gemma2", description="Make the embedded model.")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    try:
        make(parser.parse_args().to, Recipe())
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
