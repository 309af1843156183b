"""`gemma2-grpo sft`: supervised training on worked solutions, the warm start of a `train` run.

It is a run as that of `train`, with the same options; those of GRPO and the rewards play no part.
A step is one update on `prompts_per_step` solutions.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from gemma2_grpo.commands.export import Export
from gemma2_grpo.commands.train import Train
from gemma2_grpo.config import Config, replaced

if TYPE_CHECKING:
    from gemma2_grpo.run.console import Display


@dataclass(frozen=True)
class Sft(Train):
    """Train on worked solutions (supervised), and measure before and after."""

    to: Annotated[Path | None, arg(metavar="DIR")] = None
    """Also write the whole model, adapters merged, to this directory, as `export` does."""

    def __call__(self, display: "Display | None" = None) -> Path:
        """Runs or resumes supervised training; a finished run is only shown.

        Returns:
            The run directory.

        Raises:
            UserError: for anything that the user can correct.
        """
        if self.to:
            from gemma2_grpo.runtime.atomic import check_empty, check_target

            check_empty(self.to)
            check_target(self.to)
        run = self.run or Path("runs") / f"{Path(self.config_name).stem}-sft"
        Train.__call__(replace(self, run=run, config=supervised(self.config)), display)
        if self.to:
            Export(str(run), self.to, verify="never")(display)
        return run


def supervised(config: Config) -> Config:
    """The configuration of supervised training on the same model and data."""
    return replaced(
        config,
        engine="solutions",
        num_generations=1,
        temperature=1.0,
        num_iterations=1,
        beta=0.0,
        loss_type="nll",
        epsilon_high=None,
    )
