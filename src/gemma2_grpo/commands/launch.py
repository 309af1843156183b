"""`gemma2-grpo launch`: the recipe of a run for a cluster. Starts nothing and needs no JAX."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from gemma2_grpo.commands.options import ConfigName, Name, Sections
from gemma2_grpo.config import Config
from gemma2_grpo.launch.machines import Launcher
from gemma2_grpo.presets import from_mapping, read_toml


@dataclass(frozen=True)
class Launch:
    """Print the recipe of a training run for a cluster. Nothing is started."""

    tool: Annotated[Positional[Launcher], arg(metavar="TOOL")]
    """The tool that starts it: `xpk`, `jobset`, `slurm` or `skypilot`."""
    config_name: ConfigName = "gemma2-2b-v5e8"
    """Name of a preset, or path of a TOML file. The options below override its fields."""
    accelerator: Annotated[str, arg(metavar="NAME")] = "v5e-8"
    """A TPU slice such as `v5e-16`, or the GPUs of one host such as `H100:8`."""
    hosts: Annotated[int | None, arg(metavar="INT")] = None
    """Number of hosts, if the accelerator name does not imply it."""
    image: Annotated[str | None, arg(metavar="IMAGE")] = None
    """Container image with this package in it."""
    storage: Annotated[str | None, arg(metavar="PLACE")] = None
    """Persistent storage for the run directory: gs://BUCKET, a volume claim, a storage of xpk."""
    cluster: Name = None
    """Name of the cluster, for xpk."""
    name: Name = None
    """Name of the job. Default: that of the configuration."""
    run: Annotated[str | None, arg(metavar="DIR")] = None
    """Run directory on the hosts. Default: in the storage."""
    config: Sections[Config] = field(default_factory=Config)

    def __call__(self) -> None:
        """Prints the recipe.

        Raises:
            UserError: for what cannot run on these machines, or is missing.
        """
        from gemma2_grpo.launch.launch import (
            check_options,
            fit_to_host,
            job_name,
            notes_of,
            run_directory,
            tokens_of,
            train_command,
        )
        from gemma2_grpo.launch.machines import find_machines
        from gemma2_grpo.launch.recipes import render

        machines = find_machines(self.accelerator, self.hosts, self.tool)
        start = from_mapping(Config, read_toml(self.config_name), self.config_name)
        config = fit_to_host(self.config, start, machines)
        options = {"image": self.image, "storage": self.storage, "cluster": self.cluster}
        given = {option: value for option, value in options.items() if value is not None}
        check_options(self.tool, given)
        name = job_name(self.name, self.config_name)
        run = run_directory(self.tool, self.run, self.config_name, self.storage or "")
        recipe = render(
            self.tool,
            name=name,
            machines=machines,
            command=train_command(config, self.config_name, run),
            run=run,
            notes=list(notes_of(config, machines, self.tool)),
            tokens=list(tokens_of(config)),
            **given,
        )
        sys.stdout.write(recipe)
