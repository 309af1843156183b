"""`gemma2-grpo export`: what a run trained, for other tools to load."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from gemma2_grpo.commands.options import Flag
from gemma2_grpo.errors import UserError

if TYPE_CHECKING:
    from gemma2_grpo.run.console import Display


@dataclass(frozen=True)
class Export:
    """Write what a run trained, for transformers, PEFT, vLLM and others to load."""

    run: Annotated[Positional[str], arg(metavar="RUN")]
    """Run directory, finished or not; of an unfinished one the last checkpoint."""
    to: Annotated[Path, arg(metavar="DIR")]
    """Directory to write, absent or empty; it appears whole or not at all."""
    format: Literal["merged", "peft"] = "merged"
    """`merged` is a whole model, `peft` the adapters alone."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type to store. Default: that of the base's files, and float32 for adapters."""
    max_shard_gb: float = 5.0
    """Largest size of a file of weights, in 1e9 bytes."""
    verify: Literal["auto", "always", "never"] = "auto"
    """Run the export in transformers, and compare it with the policy. `auto` does where the extra
    `oracle` is installed, on a CPU with memory for both."""
    push: Annotated[str | None, arg(metavar="OWNER/NAME")] = None
    """Upload it to Hugging Face, as a private repository, after asking."""
    public: Flag = False
    """Make the repository public."""
    yes: Flag = False
    """Upload without asking."""

    def __call__(self, display: "Display | None" = None) -> Path:
        """Writes the export, with a model card.

        Returns:
            The directory.

        Raises:
            UserError: for anything that the user can correct.
        """
        from gemma2_grpo.runtime.devices import require_jax, start_jax

        require_jax()
        from gemma2_grpo.export.export import find_run, open_run, write_export
        from gemma2_grpo.export.hub import confirm_upload, upload
        from gemma2_grpo.export.verify import check_packages
        from gemma2_grpo.run.console import Display
        from gemma2_grpo.runtime.atomic import check_empty, check_target

        display = display or Display()
        source = find_run(self.run)
        if not self.max_shard_gb > 0:
            raise UserError(f"--max-shard-gb = {self.max_shard_gb} must be greater than 0")
        check_empty(self.to)
        check_target(self.to)
        if self.verify == "always":
            check_packages(self.format)
        if self.push:
            confirm_upload(self.push, public=self.public, yes=self.yes)
        start_jax(display.note)
        display.note(f"loading {source.config.model.model}")
        opened, wanted = open_run(
            source, self.to, self.format, self.dtype, self.max_shard_gb, verify=self.verify
        )
        name = self.push or self.to.resolve().name
        for text in write_export(self.to, source, opened, wanted, name):
            display.note(text)
        if self.push:
            display.note(f"uploaded to {upload(self.to, self.push, public=self.public)}")
        return self.to
