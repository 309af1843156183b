"""`gemma2-grpo train`: everything that can be refused without JAX, then the run."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from gemma2_grpo.checks import check
from gemma2_grpo.commands.options import ConfigName, Directory, Flag, Sections
from gemma2_grpo.config import OWN_ENGINES, Config, flat, replaced
from gemma2_grpo.errors import UserError

if TYPE_CHECKING:
    from gemma2_grpo.run.console import Display
    from gemma2_grpo.run.directory import RunDirectory
    from gemma2_grpo.runtime.cluster import Cluster
    from gemma2_grpo.task.scoring import Reward

# Module and package of the engines that Tunix brings no code for.
_PACKAGES = {"vllm": ("vllm", "vllm"), "sglang_jax": ("sgl_jax", "sglang-jax")}


@dataclass(frozen=True)
class Train:
    """Train with GRPO, and measure before and after."""

    config_name: ConfigName = "tiny"
    """Name of a preset, or path of a TOML file. The options below override its fields."""
    run: Directory = None
    """Run directory. An existing run there is resumed. Default: runs/NAME."""
    init_from: Annotated[str | None, arg(metavar="RUN|DIR")] = None
    """Start from what `sft` or another run trained: its run directory, or the model or the adapter
    that it wrote. Policy and reference both begin there."""
    allow_config_change: Flag = False
    """Resume although the run was made with another configuration."""
    coordinator: Annotated[str | None, arg(metavar="HOST:PORT|auto")] = None
    """Address of process 0 when several train together; `auto` asks the cluster (Cloud TPU
    pods)."""
    num_processes: int | None = None
    """Number of processes that train together; Slurm, Open MPI and GKE say so themselves."""
    process_id: int | None = None
    """Rank of this process, from 0."""
    config: Sections[Config] = field(default_factory=Config)

    def __call__(self, display: "Display | None" = None) -> Path:
        """Runs or resumes a training run; a finished one is only shown.

        Returns:
            The run directory.

        Raises:
            UserError: for anything that the user can correct.
        """
        config = check(self.config)
        from gemma2_grpo.run.console import Display
        from gemma2_grpo.run.directory import RunDirectory
        from gemma2_grpo.run.recorded_paths import with_absolute_paths
        from gemma2_grpo.runtime.cluster import find_cluster
        from gemma2_grpo.runtime.devices import require_jax

        cluster = find_cluster(self.coordinator, self.num_processes, self.process_id, os.environ)
        require_jax()
        path = self.run or Path("runs") / Path(self.config_name).stem
        display = display or Display()
        if self.init_from:
            config = _started_from(self.init_from, path, config, display, alone=cluster is None)
        with _joined(cluster, config) as writes:
            config = with_absolute_paths(config)
            display = display if writes else Display.silent()
            directory = RunDirectory(
                path, config, allow_config_change=self.allow_config_change, writes=writes
            )
            try:
                _run(config, self.config_name, directory, display, cluster)
            finally:
                directory.close()
        return path


def _started_from(
    place: str, run: Path, config: Config, display: "Display", *, alone: bool
) -> Config:
    """The configuration on the model that `--init-from` names, merged where it is not yet.

    Raises:
        UserError: for a place that cannot be started from.
    """
    from gemma2_grpo.commands.warm_start import warm_start

    if not alone and not (Path(place).expanduser() / "config.json").is_file():
        raise UserError(
            f"--init-from {place}: several processes take the directory of a whole model; write "
            "one with gemma2-grpo export, and name that"
        )
    model = warm_start(place, run / "warm_start", config.model.dtype, display.note)
    return check(replaced(config, model=model))


def _run(
    config: Config,
    config_name: str,
    directory: "RunDirectory",
    display: "Display",
    cluster: "Cluster | None",
) -> None:
    from gemma2_grpo.model.hub.find import check_model
    from gemma2_grpo.run.trackers import check_trackers, tracking
    from gemma2_grpo.runtime.devices import start_jax
    from gemma2_grpo.task.examples import load_splits
    from gemma2_grpo.task.scoring import Scorer

    result = directory.result
    if cluster:
        from gemma2_grpo.run.results import RunResult
        from gemma2_grpo.runtime.processes import from_first

        found = from_first(result and result.model_dump(mode="json"))
        result = RunResult(**found) if found else None
    if result and result.after.step >= config.run.max_steps:
        display.note(f"{directory.path} is finished; its result:")
        display.result(result)
        return
    _check_engine(config.rollout.engine)
    check_trackers(config.run)
    check_model(config.model.model)
    splits = load_splits(config.data)
    reward, reward_sha256 = _load_reward(config, directory, display)
    scorer = Scorer(config.rewards, reward)
    start_jax(display.note)
    display.warn_of_cpu(config.model, config_name)
    from gemma2_grpo.run.loop import Run
    from gemma2_grpo.run.session import open_session
    from gemma2_grpo.runtime.processes import check_same
    from gemma2_grpo.runtime.program_cache import counting_programs, use_program_cache
    from gemma2_grpo.training.loss import find_objective

    find_objective(config.grpo.loss_type)
    display.note(f"loading {config.model.model}")
    check_same({"data_sha256": splits.sha256, "reward_sha256": reward_sha256})
    cache = use_program_cache(config.run.compilation_cache, display.note)
    trackers = (
        tracking(config, directory.path) if directory.writes else nullcontext(lambda *_: None)
    )
    with counting_programs(cache) as programs, trackers as track:
        session = open_session(config, splits, directory)
        directory.describe(session.facts.model_copy(update={"reward_sha256": reward_sha256}))
        Run(session, directory, scorer, display, programs, track, _write_report).go()


def _write_report(path: Path) -> None:
    from gemma2_grpo.report.report import write_report

    write_report(path)


@contextmanager
def _joined(cluster: "Cluster | None", config: Config) -> Iterator[bool]:
    """Joins the other processes, if there are any; yields whether this is the one that writes."""
    if cluster is None:
        yield True
        return
    from gemma2_grpo.runtime.memory import keep_freed_memory

    keep_freed_memory()
    from gemma2_grpo.runtime.farewell import joined
    from gemma2_grpo.runtime.processes import check_same, is_first

    with joined(cluster.coordinator, cluster.num_processes, cluster.process_id) as count:
        check_same(flat(config))
        _check_share(config, count)
        yield is_first()


def _check_share(config: Config, processes: int) -> None:
    """Refuses a batch that does not divide over the processes, and engines that do not share it."""
    prompts, engine = config.rollout.prompts_per_step, config.rollout.engine
    if prompts % processes:
        raise UserError(
            f"prompts_per_step = {prompts} does not divide over {processes} processes; make it a "
            f"multiple of {processes}"
        )
    if engine not in OWN_ENGINES and processes > 1:
        raise UserError(
            f'engine = "{engine}" works in one process only; set engine = "group" for {processes}'
        )


def _check_engine(engine: str) -> None:
    """Refuses a rollout engine whose package is missing, before anything is loaded."""
    module, package = _PACKAGES.get(engine, (None, None))
    if module and importlib.util.find_spec(module) is None:
        raise UserError(
            f'engine = "{engine}" needs the package {package}; install it, or set engine = "group"'
        )


def _load_reward(
    config: Config, directory: "RunDirectory", display: "Display"
) -> "tuple[Reward | None, str | None]":
    """Loads the user's reward function, if there is one, and says that it is run as code."""
    spec = config.rewards.reward
    if spec is None:
        directory.check_same("reward_sha256", None)
        return None, None
    from gemma2_grpo.task.scoring import load_reward

    reward, sha256 = load_reward(spec)
    directory.check_same("reward_sha256", sha256)
    display.note(f"reward {spec} (sha256 {sha256}) is run as code")
    return reward, sha256
