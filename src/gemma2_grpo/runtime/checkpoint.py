"""Checkpoints that are written whole or not at all, and verified before they are trusted."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from gemma2_grpo.runtime.atomic import whole_directory

_MANIFEST = "manifest.json"
_STATE = "state"
_PREFIX = "step_"
_log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, state: PyTree, keep: int) -> Path:
    """Writes the state after `step` steps and keeps the newest `keep` checkpoints.

    Everything is written under a temporary name, listed with its SHA-256 in a manifest and then
    renamed, so that a killed process leaves either the whole checkpoint or none.

    Raises:
        OSError: if it could not be written; earlier checkpoints are left as they were.
    """
    final = folder / f"{_PREFIX}{step:06d}"
    try:
        with whole_directory(final) as temporary:
            with _checkpointer() as checkpointer:
                if jax.process_count() > 1:  # Orbax takes arrays of one process for a mistake.
                    state = jax.device_get(state)
                checkpointer.save((temporary / _STATE).absolute(), state)
                # Without this, Orbax reports a full disk only when it is closed, if at all.
                checkpointer.wait_until_finished()
            manifest = {"step": step, "sha256": _hashes(temporary)}
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)  # A resumed run may have passed over it.
    except Exception as error:
        raise OSError(f"checkpoint of step {step} could not be written: {error}") from error
    _prune(folder, step, keep)
    return final


def _prune(folder: Path, newest: int, keep: int) -> None:
    """Keeps `keep` checkpoints up to the newest; a later one is what a resumed run passed over."""
    steps = _steps(folder)
    kept = [step for step in steps if step <= newest][:keep]
    for step in steps:
        if step not in kept:
            shutil.rmtree(folder / f"{_PREFIX}{step:06d}")


def restore_checkpoint(folder: Path, like: PyTree) -> tuple[int, PyTree] | None:
    """Restores the newest checkpoint that verifies, onto the shardings of `like`.

    A checkpoint that is incomplete or does not match its manifest is passed over with a warning.

    Args:
        folder: Directory of the checkpoints.
        like: A state of the same structure, whose shapes, types and shardings are taken.

    Returns:
        Number of finished steps and the state; None where there is no checkpoint.

    Raises:
        OSError: if there are checkpoints but none of them can be trusted.
    """
    if not _steps(folder):
        return None
    step, path = _newest_verified(folder)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _checkpointer() as checkpointer:
        return step, checkpointer.restore(path, target)


def restore_part(folder: Path, like: Mapping[str, PyTree]) -> tuple[int, PyTree]:
    """Restores some entries of the newest checkpoint that verifies, onto the shardings of `like`.

    One that is damaged is passed over with a warning.

    Raises:
        OSError: if there is none that can be trusted.
    """
    step, path = _newest_verified(folder)
    wanted = ocp.args.PyTreeRestore(
        item=like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return step, checkpointer.restore(path, args=wanted)


def _newest_verified(folder: Path) -> tuple[int, Path]:
    """Steps and state of the newest checkpoint that verifies; others cause a warning.

    Raises:
        OSError: if there is none that can be trusted.
    """
    for step in _steps(folder):
        path = folder / f"{_PREFIX}{step:06d}"
        problem = _problem(path, step)
        if not problem:
            return step, (path / _STATE).absolute()
        _log.warning("checkpoint %s is damaged (%s); falling back", path, problem)
    raise OSError(f"{folder}: none of the checkpoints verifies; start a new run directory")


def _checkpointer() -> ocp.StandardCheckpointer:
    """Writes and reads in this process alone, without waiting for others."""
    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    own = jax.process_index()
    return ocp.StandardCheckpointer(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}"
        )
    )


def clean_temporaries(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for path in folder.glob(f".{_PREFIX}*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def latest_step(folder: Path) -> int:
    """Steps of the newest checkpoint, verified or not; 0 where there is none."""
    return max(_steps(folder), default=0)


def _steps(folder: Path) -> list[int]:
    """Steps with a checkpoint, newest first."""
    names = (path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*"))
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashes[path.relative_to(folder).as_posix()] = digest
    return hashes


def _problem(path: Path, step: int) -> str | None:
    """Fault of a checkpoint on disk, as text; None if it verifies."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        written, expected = manifest["step"], dict(manifest["sha256"])
        present = _hashes(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable manifest: {error}"
    if written != step:
        return f"its manifest is of step {written}"
    wrong = [name for name, digest in expected.items() if present.get(name) != digest]
    return f"{wrong[0]} differs from the manifest" if wrong else None
