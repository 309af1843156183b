"""Models of Kaggle: attached to a notebook, in kagglehub's cache, or downloaded."""

import io
import os
import re
from contextlib import redirect_stderr
from pathlib import Path

from gemma2_grpo.errors import UserError, first_line
from gemma2_grpo.task.reach import (
    cached_by_kagglehub,
    check_kaggle,
    disk_is_full,
    http_status,
    is_hosted,
    quiet,
)
from gemma2_grpo.task.sources import KAGGLE_PREFIX

_KAGGLE_MODEL = re.compile(r"(\w[\w.-]*)" + r"/(\w[\w.-]*)" * 3 + r"(?:/(\d+))?", re.ASCII)


def google_id(name: str) -> str | None:
    """The Hugging Face id of one of Google's models on Kaggle; None for all others."""
    parts = _KAGGLE_MODEL.fullmatch(name.removeprefix(KAGGLE_PREFIX))
    is_googles = parts and parts[1] == "google" and parts[3].lower() == "transformers"
    return f"google/{parts[4]}" if parts and is_googles else None


def from_kaggle(name: str) -> Path:
    """A Kaggle model: attached to the notebook, in kagglehub's cache, or downloaded."""
    found, is_exact = _find_here(name)
    if found and is_exact:
        return found
    import kagglehub

    try:
        check_kaggle()
        with quiet():
            return Path(kagglehub.model_download(name.removeprefix(KAGGLE_PREFIX)))
    # kagglehub raises plain ValueErrors, its HTTP library's errors and its own.
    except Exception as error:
        if found and http_status(error) is None:
            return found
        raise _not_on_kaggle(error, name) from None


def check_on_kaggle(name: str) -> None:
    """Fetches the smallest file, which needs all that the others need."""
    found, _ = _find_here(name)
    if found or is_hosted():
        return
    import kagglehub

    try:
        check_kaggle()
        with quiet(), redirect_stderr(io.StringIO()):  # A progress bar.
            kagglehub.model_download(name.removeprefix(KAGGLE_PREFIX), path="config.json")
    except Exception as error:
        raise _not_on_kaggle(error, name) from None


def _not_on_kaggle(error: Exception, name: str) -> UserError:
    page = "kaggle.com/models/{}/{}".format(*_kaggle_parts(name).groups())
    return UserError(f"model {name}: {_explain_kaggle(error, page)}")


def _find_here(name: str) -> tuple[Path | None, bool]:
    """A Kaggle model that is attached or cached, and whether it needs no look at newer versions."""
    owner, model, framework, variation, version = _kaggle_parts(name).groups()
    attached = find_attached(owner, f"{model}/{framework.lower()}/{variation}", version or "*")
    if attached:
        return attached, True
    place = f"models/{owner}/{model}/{framework}/{variation}"
    return cached_by_kagglehub(place, version=version), bool(version)


def _kaggle_parts(name: str) -> re.Match[str]:
    """Owner, model, framework, variation, and perhaps the version, of a Kaggle model's name."""
    parts = _KAGGLE_MODEL.fullmatch(name.removeprefix(KAGGLE_PREFIX))
    if parts is None:
        raise UserError(
            f"model {name!r}: not a Kaggle handle; write {KAGGLE_PREFIX}OWNER/MODEL/FRAMEWORK/"
            f"VARIATION, such as {KAGGLE_PREFIX}google/gemma-2/transformers/gemma-2-2b-it"
        )
    return parts


def find_attached(owner: str, variation: str, version: str = "*") -> Path | None:
    """The newest version of a model that is attached to this Kaggle notebook.

    Args:
        owner: Owner on Kaggle.
        variation: MODEL/FRAMEWORK/VARIATION, perhaps with wildcards.
        version: One version, or a wildcard.
    """
    inputs = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
    # Kaggle mounts by kind and owner, or has mounted by name, with the owner for second of a name.
    for place in (f"models/{owner}", f"m/{owner}", "."):
        found = (inputs / place).glob(f"{variation}/{version}")
        versions = [path for path in found if path.name.isdecimal() and path.is_dir()]
        if versions:
            return max(versions, key=lambda path: int(path.name))
    return None


def _explain_kaggle(error: Exception, page: str) -> str:
    """Says what went wrong on Kaggle, and the mend."""
    status = http_status(error)
    if status in (401, 403):
        return (
            f"Kaggle refuses it ({status}); attach it to the notebook, or accept its licence at "
            f"{page} and export KAGGLE_API_TOKEN from kaggle.com/settings"
        )
    if status == 404:
        return f"no such model on Kaggle; check the framework and the variation at {page}"
    if disk_is_full(error):
        return "no space left on the disk; free some, or set KAGGLEHUB_CACHE to a larger disk"
    return (
        f"cannot be fetched ({first_line(error)}); attach it to the notebook, check the network, "
        "or pass a local directory as model"
    )
