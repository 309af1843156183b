"""A configuration as a job for a cluster: what fits its hosts, and what each tool needs."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from gemma2_grpo.checks import check
from gemma2_grpo.config import Config, flat, replaced
from gemma2_grpo.errors import UserError
from gemma2_grpo.launch.machines import Launcher, Machines
from gemma2_grpo.launch.recipes import MOUNT, split_bucket
from gemma2_grpo.model.hub.google import kv_heads
from gemma2_grpo.presets import load_config, nearest_preset, preset_names
from gemma2_grpo.runtime.chips import mesh_for

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


def job_name(name: str | None, config_name: str) -> str:
    """A name that every tool takes, by default that of the configuration.

    Raises:
        UserError: for a name that is none.
    """
    name = name or re.sub(r"[^a-z0-9]+", "-", Path(config_name).stem.lower()).strip("-")
    if not _NAME.fullmatch(name):
        raise UserError(
            f"name {name!r} is not a name for a job; give --name of at most 40 small letters, "
            "digits and hyphens that begins with a letter"
        )
    return name


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
    heads = kv_heads(config.model.model)
    shape = config.model.mesh_shape
    if math.prod(shape) != chips:
        if shape != start.model.mesh_shape:
            raise UserError(
                f"mesh_shape = {shape} is {math.prod(shape)} chips, but a host of "
                f"{machines.accelerator} has {chips}; the mesh is that of one host, so change "
                "--mesh-shape or leave it out"
            )
        shape = mesh_for(chips, heads)
    if heads % shape[1]:
        *rest, last = (str(tp) for tp in range(1, heads + 1) if math.gcd(heads, chips) % tp == 0)
        fitting = " or ".join([", ".join(rest), last] if rest else [last])
        raise UserError(
            f"mesh_shape = {shape}: tp = {shape[1]} does not divide the {heads} KV heads of "
            f"{config.model.model}; give tp (the second) as {fitting}"
        )
    prompts = config.rollout.prompts_per_step
    if prompts % machines.hosts:
        raise UserError(
            f"prompts_per_step = {prompts} does not divide over {machines.hosts} hosts; make it a "
            f"multiple of {machines.hosts}, or take fewer hosts"
        )
    return check(replaced(config, mesh_shape=shape))


def train_command(config: Config, config_name: str, run: str) -> tuple[str, ...]:
    """The command that trains with this configuration where only the package is installed.

    A file of the user's is not there, so it becomes the preset that is most like it, and options.
    """
    if config_name in preset_names():
        base, preset = config_name, load_config(config_name)
    else:
        base, preset = nearest_preset(flat(config))
    known = flat(preset)
    changed = ((name, value) for name, value in flat(config).items() if value != known[name])
    options = (word for name, value in changed for word in _option(name, value))
    return ("gemma2-grpo", "train", base, "--run", run, *options)


def _option(name: str, value: object) -> tuple[str, ...]:
    """The words of an option."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return (f"--{option}" if value else f"--no-{option}",)
    return (f"--{option}", *map(str, value if isinstance(value, tuple) else [value]))


def check_options(launcher: Launcher, given: Mapping[str, str]) -> None:
    """Refuses a missing option, one of no use, and a storage of the wrong kind.

    Raises:
        UserError: naming the option and the fix.
    """
    meaning = _MEANING | {"storage": _STORAGE.get(launcher, "")}
    for option in _NEEDED[launcher]:
        if not given.get(option):
            raise UserError(f"{launcher} needs --{option}: {meaning[option]}")
    for option in _UNUSED[launcher]:
        if option in given:
            fix = {
                ("slurm", "storage"): "its nodes share a file system; give --run a path on that",
                ("skypilot", "image"): "it installs the checkout that it is started in",
            }.get((launcher, option), "leave it out")
            raise UserError(f"{launcher} takes no --{option}: {fix}")
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


def run_directory(launcher: Launcher, run: str | None, config_name: str, storage: str) -> str:
    """The run directory on the hosts, which has to outlive them.

    Raises:
        UserError: for one that does not.
    """
    stem = Path(config_name).stem
    if launcher == "slurm":
        return run or f"runs/{stem}"
    folder = split_bucket(storage)[1] if "://" in storage else ""
    path = PurePosixPath(run or PurePosixPath(MOUNT, folder, stem))
    if launcher != "xpk" and PurePosixPath(MOUNT) not in path.parents:
        raise UserError(
            f"run {str(path)!r} is lost with its host; the storage is mounted at {MOUNT}, "
            f"so give a path below that, or leave --run out"
        )
    return str(path)


def tokens_of(config: Config) -> Iterator[str]:
    """Yields the environment variables that the model and the data set need."""
    model = config.model.model
    if _HUB_ID.fullmatch(model) and not Path(model).exists():
        yield "HF_TOKEN"
    if any(each.startswith("kaggle:") for each in (model, config.data.dataset)):
        yield "KAGGLE_API_TOKEN"


def notes_of(config: Config, machines: Machines, launcher: Launcher) -> Iterator[str]:
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
