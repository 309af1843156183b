"""Where model weights come from: the package, a directory, Hugging Face, Kaggle."""

import json
import os
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from gemma2_grpo.config import UserError
from gemma2_grpo.task.sources import KAGGLE_PREFIX, reason

EMBEDDED = "embedded"
# Gated on Hugging Face: whoever has no token need not ask the network.
_GEMMA_2 = "google/gemma-2-"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_KAGGLE_MODEL = re.compile(r"(\w[\w.-]*)" + r"/(\w[\w.-]*)" * 3 + r"(?:/(\d+))?", re.ASCII)
_WANTED = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*",
    "*.safetensors",
    "*.safetensors.index.json",
]
_FULL_DISK = ("No space left", "quota exceeded")


def find_model(name: str, *, needs_weights: bool = True) -> Path:
    """Finds the directory with config.json, tokenizer.json and safetensors of a model.

    Args:
        name: `embedded`, a local directory, a Hugging Face id, or
            `kaggle:OWNER/MODEL/FRAMEWORK/VARIATION`, perhaps with a version. What is attached to a
            Kaggle notebook or cached is used before anything is downloaded.
        needs_weights: False for a model that is to be trained from random weights.

    Raises:
        UserError: for a model that cannot be reached, or whose files are not all there.
    """
    try:
        directory = _locate(name)
        check_files(directory, needs_weights=needs_weights)
    except (OSError, RuntimeError) as error:  # No permission, too long, the `~` of nobody.
        raise UserError(f"model {name!r}: cannot be read ({reason(error)})") from None
    return directory


def check_model(name: str) -> None:
    """Refuses what can be no model, and a local directory without the files of one.

    It asks no network, so that a misspelt name is told before anything is fetched or loaded.

    Raises:
        UserError: naming the mend.
    """
    try:
        if name.startswith(KAGGLE_PREFIX):
            _kaggle_parts(name)
        elif directory := _find_local(name):
            check_files(directory)
    except (OSError, RuntimeError) as error:
        raise UserError(f"model {name!r}: cannot be read ({reason(error)})") from None


def hub_id(name: str) -> str | None:
    """The Hugging Face id under which others find a model; None for one that is only here."""
    if name.startswith(KAGGLE_PREFIX):
        parts = _KAGGLE_MODEL.fullmatch(name.removeprefix(KAGGLE_PREFIX))
        is_googles = parts and parts[1] == "google" and parts[3].lower() == "transformers"
        return f"google/{parts[4]}" if parts and is_googles else None
    is_id = _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_id else None


def check_files(directory: Path, *, needs_weights: bool = True) -> None:
    """Checks that the files of a model are there; `load_weights` checks what is in them.

    Raises:
        UserError: naming the first file that is missing.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory}: no config.json in it; pass the directory of a whole model")
    if needs_weights:
        _check_weights(directory)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory}: no tokenizer.json in it; copy the model's there")


def _check_weights(directory: Path) -> None:
    """Checks that there are safetensors, and every shard if there is an index of them."""
    is_indexed = read_index(directory) is not None
    if not is_indexed and not any(path.is_file() for path in directory.glob("*.safetensors")):
        if any(directory.glob("*.bin")):
            raise UserError(f"{directory}: only PyTorch .bin weights; convert to safetensors")
        raise UserError(f"{directory}: no *.safetensors file in it; pass a whole model with them")


def read_index(directory: Path) -> dict[str, str] | None:
    """Reads which file has which tensor of sharded weights; None where there is no such index.

    Raises:
        UserError: for an index that is none, or a shard that it names and that is not there.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(where.values()))
        missing = [name for name in names if not (directory / name).is_file()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index}: not a readable index of shards ({reason(error)}); download it again"
        ) from None
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(names)} shards are missing, such as "
            f"{missing[0]}; download the model again"
        )
    return where


def _locate(name: str) -> Path:
    """The directory of a model, its files not yet checked."""
    if name.startswith(KAGGLE_PREFIX):
        return _from_kaggle(name)
    return _find_local(name) or _from_hub(name)


def _find_local(name: str) -> Path | None:
    """The directory of a model that is here; None for what may be on Hugging Face."""
    if name == EMBEDDED:
        return Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if _HUB_ID.fullmatch(name) and not path.exists():
        if path.parent.is_dir() and not _is_on_hub(name):
            raise UserError(
                f"model {name!r}: no such directory, although {path.parent} is one; check the "
                "path, or go to another folder for what has that name on Hugging Face"
            )
        return None
    raise UserError(
        f"model {name!r}: no such directory; use {EMBEDDED}, a directory of safetensors, a Hugging "
        f"Face id such as google/gemma-2-2b-it, or {KAGGLE_PREFIX}OWNER/MODEL/FRAMEWORK/VARIATION"
    )


def _is_on_hub(name: str) -> bool:
    """Whether a name is known, without a network, to be that of a Hugging Face repository."""
    if name.startswith(_GEMMA_2):
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _from_kaggle(name: str) -> Path:
    """A Kaggle model: attached to the notebook, in kagglehub's cache, or downloaded."""
    handle = name.removeprefix(KAGGLE_PREFIX)
    owner, model, framework, variation, version = _kaggle_parts(name).groups()
    attached = _find_attached(owner, f"{model}/{framework.lower()}/{variation}", version or "*")
    if attached:
        return attached
    import kagglehub

    try:
        return Path(kagglehub.model_download(handle))
    # kagglehub raises plain ValueErrors, its HTTP library's errors and its own.
    except Exception as error:
        page = f"kaggle.com/models/{owner}/{model}"
        raise UserError(f"model {name}: {_explain_kaggle(error, page)}") from None


def _kaggle_parts(name: str) -> re.Match[str]:
    """Owner, model, framework, variation, and perhaps the version, of a Kaggle model's name."""
    parts = _KAGGLE_MODEL.fullmatch(name.removeprefix(KAGGLE_PREFIX))
    if parts is None:
        raise UserError(
            f"model {name!r}: not a Kaggle handle; write {KAGGLE_PREFIX}OWNER/MODEL/FRAMEWORK/"
            f"VARIATION, such as {KAGGLE_PREFIX}google/gemma-2/transformers/gemma-2-2b-it"
        )
    return parts


def _find_attached(owner: str, variation: str, version: str = "*") -> Path | None:
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
    status = _http_status(error)
    if status in (401, 403):
        return (
            f"Kaggle refuses it ({status}); attach it to the notebook, or accept its licence at "
            f"{page} and export KAGGLE_API_TOKEN from kaggle.com/settings"
        )
    if status == 404:
        return f"no such model on Kaggle; check the framework and the variation at {page}"
    if _disk_is_full(error):
        return "no space left on the disk; free some, or set KAGGLEHUB_CACHE to a larger disk"
    return (
        f"cannot be fetched ({reason(error)}); attach it to the notebook, check the network, "
        "or pass a local directory as model"
    )


def _from_hub(name: str) -> Path:
    """A Hugging Face model: attached on Kaggle, in the cache (HF_HOME), or downloaded."""
    if name.startswith(_GEMMA_2):
        variation = name.removeprefix("google/")
        attached = _find_attached("google", f"gemma-2*/transformers/{variation}")
        if attached:
            return attached
    from huggingface_hub import get_token, snapshot_download

    try:
        cached_only = name.startswith(_GEMMA_2) and get_token() is None
        return Path(snapshot_download(name, allow_patterns=_WANTED, local_files_only=cached_only))
    # The hub's client, its HTTP library and the disk each raise errors of their own.
    except Exception as error:
        raise UserError(f"model {name}: {_explain_hub(error, name)}") from None


def _explain_hub(error: Exception, name: str) -> str:
    """Says what went wrong on Hugging Face, and the mend."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    if _disk_is_full(error):
        return "no space left on the disk; free some, or set HF_HOME to a larger disk"
    uncached, status = isinstance(error, hub.LocalEntryNotFoundError), _http_status(error)
    if uncached and constants.HF_HUB_OFFLINE:
        return (
            "not complete in the cache of Hugging Face while HF_HUB_OFFLINE is set; unset it, "
            "or pass a local directory as model"
        )
    gated = isinstance(error, hub.GatedRepoError) or status == 403
    if (gated or (uncached and name.startswith(_GEMMA_2))) and get_token() is None:
        return (
            "HF_TOKEN is not set; make a token at huggingface.co/settings/tokens, accept Gemma's "
            f"licence at huggingface.co/{name} and export HF_TOKEN, or attach the model on Kaggle"
        )
    if gated:
        return (
            "the account of this HF_TOKEN has no access; accept Gemma's licence at "
            f"huggingface.co/{name}, and let a fine-grained token read public gated repositories"
        )
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError):
        return (
            "no such directory and no such repository on Hugging Face; check the spelling, "
            "or HF_TOKEN if it is private"
        )
    if status == 401:
        return (
            "Hugging Face refuses this HF_TOKEN; make a new token at "
            "huggingface.co/settings/tokens and export HF_TOKEN"
        )
    return (
        f"cannot be fetched ({reason(error.__cause__ or error)}); check the network and run "
        "again, which resumes the download, or pass a local directory as model"
    )


def _http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of either library, if there is one."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response.status_code for response in responses if response is not None), None)


def _disk_is_full(error: BaseException) -> bool:
    return any(words in str(cause) for cause in _causes(error) for words in _FULL_DISK)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
