"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio."""

import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma2_grpo.config import Config, RunConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.run.schema import Identity, numbers
from gemma2_grpo.runtime.atomic import write_whole

Fields = Mapping[str, Any]
Track = Callable[[str, Fields], None]
"""Takes a kind (`train`, `held_out`) and a record with its `step`."""

_HOSTED = ("wandb", "trackio")


def check_trackers(run: RunConfig) -> None:
    """Refuses a tracker whose package is missing, before anything is loaded.

    Raises:
        UserError: naming the package.
    """
    for name in _HOSTED:
        if getattr(run, name) and importlib.util.find_spec(name) is None:
            raise UserError(
                f"{name} = {getattr(run, name)!r} needs the package {name}; "
                f"pip install {name}, or leave --{name} out"
            )


@contextmanager
def tracking(config: Config, path: Path) -> Iterator[Track]:
    """Opens all trackers of a run; a resumed run is continued there.

    Raises:
        UserError: if one of them cannot be opened.
    """
    with ExitStack() as stack:
        tracks: list[Track] = []
        if config.run.tensorboard:
            tracks.append(stack.enter_context(_tensorboard(path)))
        for name in _HOSTED:
            project = getattr(config.run, name)
            if project:
                opened = {"wandb": _wandb, "trackio": _trackio}[name](project, config, path)
                tracks.append(stack.enter_context(opened))

        def track(kind: str, record: Fields) -> None:
            for each in tracks:
                each(kind, record)

        yield track


def _numbers(kind: str, record: Fields) -> dict[str, float]:
    """The numbers of a record under their full names, such as `train/mean_components/format`."""
    found = numbers({name: value for name, value in record.items() if name != "step"}, f"{kind}.")
    return {name.replace(".", "/"): value for name, value in found.items()}


@contextmanager
def _tensorboard(path: Path) -> Iterator[Track]:
    from tensorboardX import SummaryWriter

    with ExitStack() as stack:
        writers: list[SummaryWriter] = []

        def track(kind: str, record: Fields) -> None:
            if not writers:
                # A resumed run does some steps again; what was written of them is taken back.
                opened = SummaryWriter(str(path / "tensorboard"), purge_step=record["step"])
                writers.append(stack.enter_context(opened))
            for name, value in _numbers(kind, record).items():
                writers[0].add_scalar(name, value, record["step"])

        yield track


@contextmanager
def _wandb(project: str, config: Config, path: Path) -> Iterator[Track]:
    import wandb

    try:
        run = wandb.init(
            project=project,
            name=path.resolve().name,
            id=_identity(path),
            resume="allow",
            dir=path,
            config=asdict(config),
        )
    except (wandb.Error, OSError) as error:
        raise UserError(
            f"wandb = {project!r}: cannot start ({error}); run `wandb login`, or set "
            "WANDB_MODE=offline"
        ) from None
    with run:
        run.define_metric("*", step_metric="step")
        yield lambda kind, record: run.log(_numbers(kind, record) | {"step": record["step"]})


@contextmanager
def _trackio(project: str, config: Config, path: Path) -> Iterator[Track]:
    import trackio

    try:
        run = trackio.init(
            project=project,
            # trackio knows a run by its name alone, and would continue another one of that name.
            name=f"{path.resolve().name}-{_identity(path)}",
            config=asdict(config),
            resume="allow",
            embed=False,
        )
    except Exception as error:  # The library raises nothing narrower.
        raise UserError(f"trackio = {project!r}: cannot start ({error})") from None
    try:
        yield lambda kind, record: run.log(_numbers(kind, record), step=record["step"])
    finally:
        run.finish()


def _identity(path: Path) -> str:
    """The id of a run at the trackers: drawn once, and kept in its directory.

    A run that was moved keeps its id. A copy gets one of its own, if the original is still where
    it was: else both would write to the same run.

    Raises:
        UserError: if it cannot be kept.
    """
    here, kept = path.resolve(), Identity.read(path) or Identity()
    before = Path(kept.path or here)
    original = Identity.read(before) if before != here else None
    is_copy = original is not None and original.id == kept.id
    identity = secrets.token_hex(4) if is_copy else kept.id or secrets.token_hex(4)
    if kept != (new := Identity(id=identity, path=str(here))):
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / Identity.FILE, new.as_json())
        except OSError as error:
            raise UserError(
                f"run directory {path}: {Identity.FILE} cannot be written ({error.strerror}); "
                "make room or choose another --run"
            ) from None
    return identity
