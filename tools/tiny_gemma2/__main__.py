"""Makes the embedded model: python -m tools.tiny_gemma2 --to DIR."""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from gemma2_grpo.commands.sft import Sft
from gemma2_grpo.config import SftConfig, replaced
from gemma2_grpo.errors import UserError
from gemma2_grpo.presets import load_sft_config
from tools.tiny_gemma2.lessons import tiny_phases
from tools.tiny_gemma2.tokenizer import make_config, make_tokenizer


def make(to: Path, config: SftConfig) -> None:
    """Writes tokenizer and architecture, and trains the model on them from random weights."""
    with TemporaryDirectory() as folder:
        make_config(Path(folder), make_tokenizer(Path(folder)))
        Sft("sft-tiny", to, replaced(config, model=folder))(make_phases=tiny_phases)


def main() -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser("tools.tiny_gemma2", description="Make the embedded model.")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR")
    try:
        make(parser.parse_args().to, load_sft_config("sft-tiny"))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
