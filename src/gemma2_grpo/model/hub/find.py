"""Where model weights come from: the package, a directory, Hugging Face, Kaggle."""

import json
import re
from importlib import resources
from pathlib import Path

from gemma2_grpo.errors import UserError, first_line
from gemma2_grpo.model.hub.google import google_family
from gemma2_grpo.model.hub.kaggle import check_on_kaggle, find_attached, from_kaggle, google_id
from gemma2_grpo.task.reach import ask_hub, disk_is_full, http_status, quiet
from gemma2_grpo.task.sources import KAGGLE_PREFIX

EMBEDDED = "embedded"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
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
        raise UserError(f"model {name!r}: cannot be read ({first_line(error)})") from None
    return directory


def check_model(name: str) -> None:
    """Refuses, within seconds and before anything loads, a model that cannot be had.

    What is neither here nor attached nor in a cache is asked for where it is: whether there is a
    network, such a model, and an account that may have it.

    Raises:
        UserError: naming the mend.
    """
    try:
        if name.startswith(KAGGLE_PREFIX):
            check_on_kaggle(name)
        elif directory := _find_local(name):
            check_files(directory)
        else:
            _check_on_hub(name)
    except (OSError, RuntimeError) as error:
        raise UserError(f"model {name!r}: cannot be read ({first_line(error)})") from None


def hub_id(name: str) -> str | None:
    """The Hugging Face id under which others find a model; None for one that is only here."""
    if name.startswith(KAGGLE_PREFIX):
        return google_id(name)
    is_id = _HUB_ID.fullmatch(name) and not Path(name).exists()
    return name if is_id else None


def check_files(directory: Path, *, needs_weights: bool = True) -> None:
    """Checks that the files of a model are there; `load_weights` checks what is in them.

    Raises:
        UserError: naming the first file that is missing.
    """
    if not (directory / "config.json").is_file():
        _refuse_gguf(directory)
        raise UserError(f"{directory}: no config.json in it; pass the directory of a whole model")
    if needs_weights:
        _check_weights(directory)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory}: no tokenizer.json in it; copy the model's there")


def _check_weights(directory: Path) -> None:
    """Checks that there are safetensors, and every shard if there is an index of them."""
    is_indexed = read_index(directory) is not None
    if not is_indexed and not any(path.is_file() for path in directory.glob("*.safetensors")):
        _refuse_gguf(directory)
        if any(directory.glob("*.bin")):
            raise UserError(f"{directory}: only PyTorch .bin weights; convert to safetensors")
        raise UserError(f"{directory}: no *.safetensors file in it; pass a whole model with them")


def _refuse_gguf(place: Path) -> None:
    """Refuses a GGUF file, or a directory that holds one, naming what converts it."""
    file = place if place.suffix == ".gguf" else next(iter(sorted(place.glob("*.gguf"))), None)
    if file:
        raise UserError(
            f"{file}: is a GGUF file; convert it to safetensors with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(file.parent)!r}, gguf_file={file.name!r})"
            ".save_pretrained(DIR), the tokenizer likewise, and pass DIR"
        )


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
            f"{index}: not a readable index of shards ({first_line(error)}); download it again"
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
        return from_kaggle(name)
    return _find_local(name) or _from_hub(name)


def _find_local(name: str) -> Path | None:
    """The directory of a model that is here; None for what may be on Hugging Face."""
    if name == EMBEDDED:
        return Path(str(resources.files("gemma2_grpo") / "assets" / "tiny-gemma2"))
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.suffix == ".gguf":
        _refuse_gguf(path)
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
    if google_family(name):
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _from_hub(name: str) -> Path:
    """A Hugging Face model: attached on Kaggle, in the cache (HF_HOME), or downloaded."""
    if attached := _attached_for(name):
        return attached
    from huggingface_hub import snapshot_download

    try:
        cached_only = _lacks_token(name) or (_is_cached(name) and not _answers(name))
        with quiet():
            found = snapshot_download(name, allow_patterns=_WANTED, local_files_only=cached_only)
        return Path(found)
    # The hub's client, its HTTP library and the disk each raise errors of their own.
    except Exception as error:
        raise UserError(f"model {name}: {_explain_hub(error, name)}") from None


def _check_on_hub(name: str) -> None:
    """Asks for config.json, unless all is here or there is no token to ask with."""
    if _attached_for(name) or _is_cached(name):
        return
    from huggingface_hub import constants, errors

    try:
        if constants.HF_HUB_OFFLINE or _lacks_token(name):
            raise errors.LocalEntryNotFoundError(name)
        ask_hub(name, "config.json", "model")
    except errors.RemoteEntryNotFoundError:
        raise UserError(f"model {name}: no config.json in it; name a whole model") from None
    except Exception as error:
        raise UserError(f"model {name}: {_explain_hub(error, name)}") from None


def _attached_for(name: str) -> Path | None:
    """What is attached on Kaggle in place of a model of Hugging Face."""
    family = google_family(name)
    if family is None:
        return None
    variation = name.removeprefix("google/")
    return find_attached("google", f"{family}*/transformers/{variation}")


def _lacks_token(name: str) -> bool:
    """Whether Hugging Face need not be asked; a mirror may give Gemma to anybody."""
    from huggingface_hub import constants, get_token

    if google_family(name) is None or constants.ENDPOINT != constants._HF_DEFAULT_ENDPOINT:
        return False
    return get_token() is None


def _is_cached(name: str) -> bool:
    """Whether all of a model is in the cache of Hugging Face."""
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            check_files(Path(snapshot_download(name, local_files_only=True)))
    except Exception:  # Whatever is wrong with it, it is not all there.
        return False
    return True


def _answers(name: str) -> bool:
    """Whether a newer version of a cached model can be asked for."""
    try:
        ask_hub(name, "config.json", "model")
    except Exception:
        return False
    return True


def _explain_hub(error: Exception, name: str) -> str:
    """Says what went wrong on Hugging Face, and the mend."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    if disk_is_full(error):
        return "no space left on the disk; free some, or set HF_HOME to a larger disk"
    uncached, status = isinstance(error, hub.LocalEntryNotFoundError), http_status(error)
    if uncached and constants.HF_HUB_OFFLINE:
        return (
            "not complete in the cache of Hugging Face while HF_HUB_OFFLINE is set; unset it, "
            "or pass a local directory as model"
        )
    is_refused = status == 403 or (status == 401 and google_family(name) is not None)
    gated = isinstance(error, hub.GatedRepoError) or is_refused
    if (gated and get_token() is None) or (uncached and _lacks_token(name)):
        return (
            "HF_TOKEN is not set; make a token at huggingface.co/settings/tokens, accept Gemma's "
            f"licence at huggingface.co/{name} and export HF_TOKEN, or attach the model on Kaggle"
        )
    if isinstance(error, hub.GatedRepoError) or status == 403:
        return (
            "the account of this HF_TOKEN has no access; accept Gemma's licence at "
            f"huggingface.co/{name}, and let a fine-grained token read public gated repositories"
        )
    is_unknown = status == 404 or isinstance(
        error, hub.RepositoryNotFoundError | hub.HFValidationError
    )
    if is_unknown and not (status == 401 and get_token()):
        return (
            "no such directory and no such repository on Hugging Face; check the spelling, "
            "or HF_TOKEN if it is private"
        )
    if status == 401:
        return (
            "Hugging Face refuses this HF_TOKEN; make a new token at "
            "huggingface.co/settings/tokens and export HF_TOKEN"
            + ("; or there is no such repository: check the spelling" if is_unknown else "")
        )
    return (
        f"cannot be fetched ({first_line(error.__cause__ or error)}); check the network and run "
        "again, which resumes the download, or pass a local directory as model"
    )
