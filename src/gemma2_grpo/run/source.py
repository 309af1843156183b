"""Opening what was trained, or any Gemma 2, to measure, ask or export it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma2_grpo.config import Config, EvaluateConfig, ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.find import EMBEDDED, check_model
from gemma2_grpo.presets import load_config
from gemma2_grpo.run.directory import read_config
from gemma2_grpo.run.recorded_paths import with_absolute_paths
from gemma2_grpo.run.results import RunResult
from gemma2_grpo.run.schema import RunFacts

if TYPE_CHECKING:  # A source is found without JAX.
    from jax.sharding import Mesh
    from tunix.models.gemma import model as gemma

    from gemma2_grpo.model.tokenizer import Tokenizer
    from gemma2_grpo.sampling.sampler import Sampler

ADAPTER = "adapter"
# No prompt of GSM8K is longer; what fits costs no more for a higher limit.
_MAX_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class Source:
    """What `RUN|MODEL` on a command line names, known before JAX is imported."""

    name: str
    config: Config
    """Of the run; for a model, what suits it."""
    run: Path | None
    """The run directory; None for a model."""
    facts: RunFacts
    """Content of run.json; empty for a model."""

    @property
    def title(self) -> str:
        """Name for people: of the run directory, or of the model."""
        return self.run.name if self.run else self.name


def find_source(name: str, adapter: str | None = None) -> Source:
    """Takes a run directory, a directory of a model, a Hugging Face or Kaggle id, or `embedded`.

    Args:
        name: Of the run or model.
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
    config = replace(config, model=replace(config.model, model=name))
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
    model = replace(source.config.model, adapter=str(place), **adapter_shape(place))
    return replace(source, config=replace(source.config, model=model))


def as_asked(source: Source, asked: EvaluateConfig) -> Source:
    """The source with what a command line sets in place of what the run has.

    Raises:
        UserError: for an adapter that does not go with the source.
    """
    if asked.adapter:
        source = with_adapter(source, asked.adapter)
    config = source.config
    data = {"dataset": asked.data, "eval_split": asked.split}
    rollout = {
        "temperature": asked.temperature,
        "max_prompt_tokens": asked.max_prompt_tokens
        or max(_MAX_PROMPT_TOKENS, config.rollout.max_prompt_tokens),
        "max_completion_tokens": asked.max_completion_tokens,
    }
    run = {"seed": asked.seed, "eval_batch_prompts": asked.batch_prompts}
    config = replace(
        config,
        data=replace(config.data, **_set(data)),
        rollout=replace(config.rollout, **_set(rollout)),
        run=replace(config.run, **_set(run)),
    )
    return replace(source, config=with_absolute_paths(config))


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


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
    """A model on the devices at hand, beside it the policy where there are adapters."""

    config: Config
    tokenizer: "Tokenizer"
    mesh: "Mesh"
    base: "gemma.Gemma"
    policy: "gemma.Gemma | None"
    """Shares its base weights with `base`."""
    steps: int
    """Steps that the policy was trained for."""
    directory: Path
    """Of the base's files."""

    def sampler(self, *, adapted: bool) -> "Sampler":
        """What completes prompts, with the adapters or with the base alone."""
        from gemma2_grpo.sampling.sampler import Sampler

        model = self.policy if adapted and self.policy is not None else self.base
        merge = self.config.model.dtype == "float32" and model is self.policy
        return Sampler(
            model,
            self.tokenizer,
            self.mesh,
            self.config.rollout,
            merged_scale=self.config.model.lora_scale if merge else None,
        )


def open_source(source: Source) -> Opened:
    """Loads the weights and adapters of a source; `find_source` comes first, without JAX.

    The mesh of a run is kept where its devices are present. Elsewhere all devices at hand are
    used, so that what a TPU has trained can be asked on a laptop.

    Raises:
        UserError: for anything that the user can mend, before the weights load.
    """
    from gemma2_grpo.model.adapter import fingerprint
    from gemma2_grpo.model.architecture import read_architecture
    from gemma2_grpo.model.find import find_model
    from gemma2_grpo.model.load import load_weights
    from gemma2_grpo.model.mesh import check_mesh, make_mesh, mesh_shape_at_hand
    from gemma2_grpo.model.tokenizer import load_tokenizer

    directory = find_model(source.config.model.model)
    architecture = read_architecture(directory)
    shape = mesh_shape_at_hand(source.config.model.mesh_shape, architecture)
    model = replace(source.config.model, mesh_shape=shape)
    config = replace(source.config, model=model)
    mesh = make_mesh(shape)
    check_mesh(architecture, mesh)
    tokenizer = load_tokenizer(directory)
    adapter = finished_adapter(source)
    base_sha256 = fingerprint(directory)
    _check_same_base(source, adapter, model, base_sha256)
    base = load_weights(directory, model.dtype, mesh)
    policy, steps = _adapted(source, adapter, base, config, mesh)
    return Opened(config, tokenizer, mesh, base, policy, steps, directory)


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
    """What a finished run measured, unless it has gone on since."""
    from gemma2_grpo.model.adapter import ADAPTER_FILE
    from gemma2_grpo.runtime.checkpoint import latest_step

    if source.run is None:
        return None
    result = RunResult.read(source.run)
    is_last = result and result.after.step >= latest_step(source.run / "checkpoints")
    return result if is_last and (source.run / ADAPTER / ADAPTER_FILE).is_file() else None


def _check_same_base(
    source: Source, adapter: Path | None, model: ModelConfig, base_sha256: str
) -> None:
    from gemma2_grpo.model.adapter import check_adapter

    if adapter:
        check_adapter(adapter, model, base_sha256)
    elif source.facts.base_sha256 not in (None, base_sha256):
        raise UserError(
            f"run {source.run}: was trained on other weights than those of {model.model} now; "
            "put the ones it was trained on there"
        )


def _adapted(
    source: Source,
    adapter: Path | None,
    base: "gemma.Gemma",
    config: Config,
    mesh: "Mesh",
) -> tuple["gemma.Gemma | None", int]:
    """The base with its adapters, and the steps they were trained for."""
    from gemma2_grpo.model.adapter import load_adapter
    from gemma2_grpo.model.lora import adapters_of, add_lora, set_adapters
    from gemma2_grpo.runtime.checkpoint import restore_part

    if source.run is None and adapter is None:
        return None, 0
    policy = add_lora(base, config.model, mesh, config.run.seed)
    if adapter:
        load_adapter(policy, adapter)
        result = _result(source)
        return policy, result.after.step if result else 0
    try:
        steps, state = restore_part(
            cast(Path, source.run) / "checkpoints", {"lora": adapters_of(policy)}
        )
    except OSError as error:
        raise UserError(str(error)) from None
    set_adapters(policy, state["lora"])
    return policy, steps
