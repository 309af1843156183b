"""Google's Gemma models: what is known of them by name, without their files."""

import re
import tomllib
from importlib import resources

from gemma2_grpo.model.config_json import JsonObject

_HUB_ID = re.compile(r"google/gemma-([23])-")
_CONFIGS: dict[str, JsonObject] = tomllib.loads(
    (resources.files("gemma2_grpo.model.hub") / "google.toml").read_text(encoding="utf-8")
)


def google_family(name: str) -> str | None:
    """Google's name on Kaggle of the family of a Hugging Face id, such as `gemma-3`.

    None for what is not one of Google's Gemma models that are trained here. All of them are gated:
    their licence has to be accepted, and the account be known by its token.
    """
    found = _HUB_ID.match(name)
    return f"gemma-{found[1]}" if found else None


def known_config(name: str) -> JsonObject | None:
    """Fields of the config.json of one of Google's text models, by any name that contains its own.

    Args:
        name: A Hugging Face id, a Kaggle handle or another name.
    """
    for model, values in _CONFIGS.items():
        if re.search(model.replace("gemma-", "gemma-?") + r"(?![0-9a-z])", name.lower()):
            return dict(values)
    return None


def kv_heads(name: str) -> int:
    """KV heads of a model, which tensor parallelism divides; 4 where it is not known by name.

    All of Gemma 2 have a multiple of 4.
    """
    return (known_config(name) or {}).get("num_key_value_heads", 4)
