"""Opening what was trained, or any Gemma, to measure, ask or export it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_grpo.config import Config, EvaluateConfig, replaced
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.hub.find import EMBEDDED, check_model
from gemma2_grpo.presets import load_config
from gemma2_grpo.run.directory import read_config
from gemma2_grpo.run.recorded_paths import with_absolute_paths
from gemma2_grpo.run.results import RunResult
from gemma2_grpo.run.schema import RunFacts

if TYPE_CHECKING:  # A source is found without JAX.
    from gemma2_grpo.model.open import ModelFiles
    from gemma2_grpo.model.weights import Model
    from gemma2_grpo.sampling.rollout import Sample

ADAPTER = "adapter"
# No prompt of GSM8K is longer; what fits costs no more for a higher limit.
_MAX_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Source:
    """The run or model that a command line names, resolved before JAX is imported."""

    name: str
    config: Config
    """Configuration of the run; for a model, one that suits it."""
    run: Path | None
    """The run directory; None for a model."""
    facts: RunFacts
    """Content of run.json; empty for a model."""

    @property
    def title(self) -> str:
        """Name of the run directory, or of the model."""
        return self.run.name if self.run else self.name


def find_source(name: str, adapter: str | None = None) -> Source:
    """Takes a run directory, a directory of a model, a Hugging Face or Kaggle id, or `embedded`.

    Args:
        name: Name of the run or model.
        adapter: A saved adapter that goes with the model; its file says where it was made.

    Raises:
        UserError: for what is neither a run nor a model, for a run that has trained nothing yet,
            and for one whose model has gone.
    """
    path = Path(name).expanduser()
    if (path / "config.toml").is_file():
        return _of_run(name, path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{path}: neither a run (no config.toml in it) nor a model (no config.json)"
        )
    if adapter:
        _check_place(name, Path(adapter).expanduser())
    check_model(name)
    # Every model but the embedded one is asked as the flagship is.
    config = load_config("tiny" if name == EMBEDDED else "gemma2-2b-v5e8")
    config = replaced(config, model=name)
    return Source(name, with_absolute_paths(config), None, RunFacts())


def _check_place(name: str, adapter: Path) -> None:
    """Refuses the model of an adapter by a path that leads to it from another folder only.

    Such a path looks like a repository on Hugging Face, which would be asked for it.
    """
    from gemma2_grpo.model.adapter import adapter_base

    base = adapter_base(adapter)
    if not Path(name).exists() and base.endswith(f"/{name}") and Path(base).is_dir():
        raise UserError(
            f"model {name!r}: no such directory here; the adapter was made on {base}: pass that"
        )


def with_adapter(source: Source, folder: str) -> Source:
    """The model of a source with a saved adapter, whose shape the adapter's file says.

    Raises:
        UserError: if the source is a run, or there is no readable adapter.
    """
    from gemma2_grpo.model.adapter import adapter_shape

    if source.run:
        raise UserError(
            f"adapter = {folder}: run {source.run} has its own; name the model in place of the run"
        )
    place = Path(folder).expanduser()
    config = replaced(source.config, adapter=str(place), **adapter_shape(place))
    return replace(source, config=config)


def as_asked(source: Source, asked: EvaluateConfig) -> Source:
    """The source with what a command line sets in place of what the run has.

    Raises:
        UserError: for an adapter that does not go with the source.
    """
    if asked.adapter:
        source = with_adapter(source, asked.adapter)
    config = source.config
    own = ("adapter", "eval_samples", "num_test_samples")  # These are of the evaluation alone.
    values = {k: v for k, v in vars(asked).items() if k not in own and v is not None}
    longest = max(_MAX_PROMPT_TOKENS, config.rollout.max_prompt_tokens)
    config = replaced(config, **{"max_prompt_tokens": longest, **values})
    return replace(source, config=with_absolute_paths(config))


def _of_run(name: str, path: Path) -> Source:
    config = read_config(path)
    if not any((path / "checkpoints").glob("step_*")) and not (path / ADAPTER).is_dir():
        raise UserError(
            f"run {path}: has no checkpoint yet; one is written every checkpoint_every_steps = "
            f"{config.run.checkpoint_every_steps} steps and when a run is stopped"
        )
    check_model(config.model.model)
    return Source(name, config, path, RunFacts.read(path) or RunFacts())


@dataclass(frozen=True)
class Opened:
    """A model on the devices of this machine, with its policy where there are adapters."""

    config: Config
    files: "ModelFiles"
    base: "Model"
    policy: "Model | None"
    """Shares its base weights with `base`."""
    steps: int
    """Steps that the policy was trained for."""

    def sampler(self, *, adapted: bool) -> "Sample":
        """`sample` with the adapters, or with the base alone, and the settings of the source."""
        from gemma2_grpo.sampling.rollout import sampler

        model = self.policy if adapted and self.policy is not None else self.base
        return sampler(self.config, model, self.files.tokenizer, self.files.mesh)


def open_source_files(source: Source) -> "ModelFiles":
    """Finds the files of a source's model; `find_source` comes first, without JAX.

    The mesh of a run is kept where its devices are present. Elsewhere all present devices are
    used, so that what a TPU has trained can be asked on a laptop.

    Raises:
        UserError: for a model that is not whole or does not suit the devices.
    """
    from gemma2_grpo.model.open import open_files

    return open_files(source.config.model, adapts_mesh=True)


def open_source(source: Source, files: "ModelFiles | None" = None) -> Opened:
    """Loads the weights and adapters of a source.

    Raises:
        UserError: for anything that the user can correct, before the weights load.
    """
    files = files or open_source_files(source)
    config = replace(source.config, model=files.config)
    adapter = finished_adapter(source)
    if adapter:
        files.check_adapters(adapter)
    elif source.facts.base_sha256 not in (None, files.sha256):
        raise UserError(
            f"run {source.run}: was trained on other weights than those of {files.config.model} "
            "now; put the ones it was trained on there"
        )
    base = files.load_base()
    if source.run is None and adapter is None:
        return Opened(config, files, base, None, 0)
    policy = files.make_policy(base, config.run.seed, adapter)
    if source.run and not adapter:
        steps = _restore_adapters(policy, source.run)
    else:
        result = _result(source)
        steps = result.after.step if result else 0
    return Opened(config, files, base, policy, steps)


def finished_adapter(source: Source) -> Path | None:
    """Folder of the adapter to load; None where the last checkpoint has it, or nothing has."""
    if source.run is None:
        return Path(source.config.model.adapter) if source.config.model.adapter else None
    return source.run / ADAPTER if _result(source) else None


def trained_steps(source: Source) -> int:
    """Steps that a run has come to, without loading anything; 0 for a model."""
    from gemma2_grpo.runtime.checkpoint import latest_step

    result = _result(source)
    if source.run is None or result:
        return result.after.step if result else 0
    return latest_step(source.run / "checkpoints")


def _result(source: Source) -> RunResult | None:
    """Result of a finished run, unless it has been continued since."""
    from gemma2_grpo.model.adapter import ADAPTER_FILE
    from gemma2_grpo.runtime.checkpoint import latest_step

    if source.run is None:
        return None
    result = RunResult.read(source.run)
    is_last = result and result.after.step >= latest_step(source.run / "checkpoints")
    return result if is_last and (source.run / ADAPTER / ADAPTER_FILE).is_file() else None


def _restore_adapters(policy: "Model", run: Path) -> int:
    """Puts the adapters of a run's last good checkpoint into a policy; returns their steps."""
    from gemma2_grpo.model.lora import adapters_of, set_adapters
    from gemma2_grpo.runtime.checkpoint import restore_part

    try:
        steps, state = restore_part(run / "checkpoints", {"lora": adapters_of(policy)})
    except OSError as error:
        raise UserError(str(error)) from None
    set_adapters(policy, state["lora"])
    return steps
