"""`gemma2-grpo launch`: a configuration as a job for a cluster. Runs nothing and needs no JAX."""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gemma2_grpo.config import Config, check
from gemma2_grpo.errors import UserError
from gemma2_grpo.launch import recipes
from gemma2_grpo.launch.machines import Launcher, Machines, find_machines
from gemma2_grpo.presets import from_mapping, load_config, preset_names, read_toml

_RECIPES = {
    "xpk": recipes.xpk,
    "jobset": recipes.jobset,
    "slurm": recipes.slurm,
    "skypilot": recipes.skypilot,
}
# Which options a recipe cannot do without, and which it would have no use for.
_NEEDED = {
    "xpk": ("image", "storage", "cluster"),
    "jobset": ("image", "storage"),
    "slurm": (),
    "skypilot": ("storage",),
}
_UNUSED = {
    "xpk": (),
    "jobset": ("cluster",),
    "slurm": ("storage", "cluster"),
    "skypilot": ("image", "cluster"),
}
_MEANING = {
    "image": "the container image with gemma2-grpo in it; docs/scaling.md shows how to build one",
    "cluster": "the name of the GKE cluster",
}
_STORAGE = {
    "xpk": "the name of a storage that is attached to the cluster",
    "jobset": "gs://BUCKET, or the name of a volume claim",
    "skypilot": "gs://BUCKET, or that of another cloud",
}
# Names that xpk takes, and Kubernetes with what is added to them.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", re.ASCII)
_CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9]+://[\w.-]+(/[^\s?#]*)?", re.ASCII)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Gemma 2 by size: the heads that tensor parallelism divides. All are multiples of 4.
_KV_HEADS = {"2b": 4, "9b": 8, "27b": 16}
_TENSOR_PARALLEL = (4, 2, 1)


def launch(
    config: Config,
    config_name: str,
    launcher: Launcher,
    accelerator: str,
    *,
    hosts: int | None = None,
    image: str | None = None,
    storage: str | None = None,
    cluster: str | None = None,
    name: str | None = None,
    run: str | None = None,
) -> str:
    """Writes the recipe of a run for a cluster.

    Args:
        config: The configuration, with what the command line changed.
        config_name: Preset or file that it began with.
        launcher: Whose recipe.
        accelerator: A TPU slice such as `v5e-16`, or the GPUs of one host such as `H100:8`.
        hosts: How many; None for what the accelerator comes with.
        image: Container image with this package in it.
        storage: Bucket, volume claim or storage of xpk that holds the run.
        cluster: Name of the cluster, for xpk.
        name: Of the job; by default that of the configuration.
        run: Run directory on the hosts; by default in the storage.

    Returns:
        The recipe, a shell script or YAML.

    Raises:
        UserError: for what cannot run on these machines, or is missing.
    """
    machines = find_machines(accelerator, hosts, launcher)
    start = from_mapping(Config, read_toml(config_name), config_name)
    config = fit_to_host(config, start, machines)
    options = {"image": image, "storage": storage, "cluster": cluster}
    given = {option: value for option, value in options.items() if value is not None}
    _check_options(launcher, given)
    stem = Path(config_name).stem
    job_name = name or re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")
    if not _NAME.fullmatch(job_name):
        raise UserError(
            f"name {job_name!r} is not a name for a job; give --name of at most 40 small letters, "
            "digits and hyphens that begins with a letter"
        )
    run = _run_directory(launcher, run, stem, given.get("storage", ""))
    job = recipes.Job(
        name=job_name,
        machines=machines,
        command=train_command(config, config_name, run),
        run=run,
        notes=tuple(_notes(config, machines, launcher)),
        tokens=tuple(_tokens(config)),
        **given,
    )
    return _RECIPES[launcher](job)


def fit_to_host(config: Config, start: Config, machines: Machines) -> Config:
    """Gives a configuration the mesh of one host, unless it has it or the user chose one.

    Args:
        config: The configuration, with what the command line changed.
        start: The configuration before that.
        machines: Hosts, each of which is a replica with a mesh of its own chips.

    Raises:
        UserError: if the mesh, the heads or the prompts do not divide.
    """
    chips = machines.chips_per_host
    shape = config.model.mesh_shape
    if math.prod(shape) != chips:
        if shape != start.model.mesh_shape:
            raise UserError(
                f"mesh_shape = {shape} is {math.prod(shape)} chips, but a host of "
                f"{machines.accelerator} has {chips}; the mesh is that of one host, so change "
                "--mesh-shape or leave it out"
            )
        tensor = next(size for size in _TENSOR_PARALLEL if chips % size == 0)
        shape = (chips // tensor, tensor)
    size = re.search(r"gemma-?2-(2b|9b|27b)", config.model.model.lower())
    heads = _KV_HEADS[size[1]] if size else 4
    if heads % shape[1]:
        raise UserError(
            f"mesh_shape = {shape}: tp = {shape[1]} does not divide the {heads} KV heads of "
            f"{config.model.model}; give tp (the second) as 1, 2 or 4"
        )
    prompts = config.rollout.prompts_per_step
    if prompts % machines.hosts:
        raise UserError(
            f"prompts_per_step = {prompts} does not divide over {machines.hosts} hosts; make it a "
            f"multiple of {machines.hosts}, or take fewer hosts"
        )
    model = dataclasses.replace(config.model, mesh_shape=shape)
    return check(dataclasses.replace(config, model=model))


def train_command(config: Config, config_name: str, run: str) -> tuple[str, ...]:
    """The command that trains with this configuration where only the package is installed.

    A file of the user's is not there, so it becomes the preset that is most like it, and options.
    """
    if config_name in preset_names():
        base = config_name
    else:
        trainable = [name for name in preset_names() if not name.startswith("sft-")]
        base = min(trainable, key=lambda name: len(list(_overrides(config, load_config(name)))))
    differences = (word for words in _overrides(config, load_config(base)) for word in words)
    return ("gemma2-grpo", "train", base, "--run", run, *differences)


def _overrides(config: Config, base: Config) -> Iterator[tuple[str, ...]]:
    """Yields the words of an option for each field that differs."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(config, section.name)):
            value = getattr(getattr(config, section.name), field.name)
            if value == getattr(getattr(base, section.name), field.name):
                continue
            option = field.name.replace("_", "-")
            if isinstance(value, bool):
                yield (f"--{option}" if value else f"--no-{option}",)
            elif isinstance(value, tuple):
                yield (f"--{option}", *map(str, value))
            else:
                yield (f"--{option}", str(value))


def _check_options(launcher: Launcher, given: dict[str, str]) -> None:
    """Refuses a missing option, one of no use, and a storage of the wrong kind."""
    meaning = _MEANING | {"storage": _STORAGE.get(launcher, "")}
    for option in _NEEDED[launcher]:
        if not given.get(option):
            raise UserError(f"{launcher} needs --{option}: {meaning[option]}")
    for option in _UNUSED[launcher]:
        if option in given:
            mend = {
                ("slurm", "storage"): "its nodes share a file system; give --run a path on that",
                ("skypilot", "image"): "it installs the checkout that it is started in",
            }.get((launcher, option), "leave it out")
            raise UserError(f"{launcher} takes no --{option}: {mend}")
    storage = given.get("storage", "")
    is_bucket, is_claim = (bool(each.fullmatch(storage)) for each in (_BUCKET, _CLAIM))
    kinds = {
        "xpk": bool(storage) and not is_bucket,
        "jobset": is_claim or (is_bucket and storage.startswith("gs://")),
        "slurm": True,
        "skypilot": is_bucket,
    }
    if not kinds[launcher]:
        raise UserError(f"storage {storage!r}: {launcher} takes {_STORAGE[launcher]}")


def _run_directory(launcher: Launcher, run: str | None, stem: str, storage: str) -> str:
    """The run directory on the hosts, which has to outlive them."""
    if launcher == "slurm":
        return run or f"runs/{stem}"
    folder = recipes.split_bucket(storage)[1] if "://" in storage else ""
    path = PurePosixPath(run or PurePosixPath(recipes.MOUNT, folder, stem))
    if launcher != "xpk" and PurePosixPath(recipes.MOUNT) not in path.parents:
        raise UserError(
            f"run {str(path)!r} is lost with its host; the storage is mounted at {recipes.MOUNT}, "
            f"so give a path below that, or leave --run out"
        )
    return str(path)


def _tokens(config: Config) -> Iterator[str]:
    """Yields the environment variables that the model and the data set need."""
    model = config.model.model
    if _HUB_ID.fullmatch(model) and not Path(model).exists():
        yield "HF_TOKEN"
    if any(each.startswith("kaggle:") for each in (model, config.data.dataset)):
        yield "KAGGLE_API_TOKEN"


def _notes(config: Config, machines: Machines, launcher: Launcher) -> Iterator[str]:
    """Yields what the reader of the recipe should know."""
    hosts, chips = machines.hosts, machines.chips_per_host
    fsdp, tensor = config.model.mesh_shape
    prompts = config.rollout.prompts_per_step
    yield (
        f"{machines.accelerator}: {_count(hosts, 'host')} of {_count(chips, 'chip')}, each with a "
        f"mesh of {fsdp} x {tensor} (fsdp x tp)"
        + (f" and {prompts // hosts} of the {prompts} prompts of a step." if hosts > 1 else ".")
    )
    if launcher in ("xpk", "jobset"):
        named = (config.model.model, config.model.adapter, config.data.dataset)
        code = (config.rewards.reward or "").rpartition(":")[0]
        for path in (*named, code):
            if path and Path(path).exists():
                yield f"It reads {path}, which must be in the image."
    yield "Tests check its syntax and its options. It has not been run on a cluster."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
