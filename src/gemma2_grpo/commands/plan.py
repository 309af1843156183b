"""`gemma2-grpo plan`: whether a run fits in device memory and finishes in time."""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated

from tyro.conf import arg

from gemma2_grpo.checks import check
from gemma2_grpo.commands.options import ConfigName, Flag, Sections
from gemma2_grpo.config import Config

_DOES_NOT_FIT = 3  # Exit status.


@dataclass(frozen=True)
class Plan:
    """Check whether a run fits in memory and finishes in time, without the devices.

    Exits with 3 if not. Uses the target's own compiler where that is installed.
    """

    config_name: ConfigName = "gemma2-2b-v5e8"
    """Name of a preset, or path of a TOML file. The options below override its fields."""
    target: Annotated[str, arg(metavar="NAME")] = "v5e-8"
    """v5e-1, v5e-4, v5e-8, v6e-8, v4-8, v5p-8, cpu; by estimate h100, a100, l4, t4."""
    json: Flag = False
    """Print one JSON object instead of tables."""
    budget: Annotated[float, arg(metavar="HOURS")] = 9.0
    """Hours that the run may take."""
    mean_completion_tokens: int = 200
    """Assumed mean completion length in tokens, for the time estimate."""
    config: Sections[Config] = field(default_factory=Config)

    def __call__(self) -> int:
        """Prints the plan, and returns the exit status."""
        config = check(self.config)
        from gemma2_grpo.plan.plan import make_plan
        from gemma2_grpo.plan.view import print_plan
        from gemma2_grpo.run.console import open_console
        from gemma2_grpo.runtime.devices import require_jax

        require_jax()
        quiet = open_console(stderr=True)
        with quiet.status("planning") as status:

            def note(text: str) -> None:
                status.update(text)
                if not quiet.is_terminal:
                    quiet.print(text, soft_wrap=True)

            made = make_plan(
                config,
                self.target,
                budget_hours=self.budget,
                mean_completion_tokens=self.mean_completion_tokens,
                note=note,
            )
        if self.json:
            print(json.dumps(asdict(made), indent=1))
        else:
            print_plan(made, config, self.config_name, open_console())
        return 0 if made.fits and made.is_in_time else _DOES_NOT_FIT
