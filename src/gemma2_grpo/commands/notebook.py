"""The machine that a notebook runs on (Kaggle, Colab or another), and what to train there."""

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_grpo.checks import check
from gemma2_grpo.config import Config, replaced
from gemma2_grpo.errors import UserError
from gemma2_grpo.model.hub.google import kv_heads
from gemma2_grpo.presets import load_config
from gemma2_grpo.runtime.chips import mesh_for

TOKEN = "HF_TOKEN"  # noqa: S105 (the name of the secret, not the secret)
# In the order of preference: the first whose model can be had.
_FLAGSHIPS = {
    "tpu": ("gemma2-2b-v5e8", "gemma3-1b-v5e8"),
    "gpu": ("gemma2-2b-gpu", "gemma3-1b-gpu"),
}
_EMBEDDED = "tiny"


@dataclass(frozen=True)
class Machine:
    """Machine of a notebook, and the configuration to train there."""

    host: str
    """`Kaggle`, `Colab` or `this machine`."""
    devices: str
    config_name: str
    config: Config
    reason: str
    """Why this configuration."""

    def __str__(self) -> str:
        """Lines for a person."""
        return (
            f"{self.host}: {self.devices}\n"
            f"configuration {self.config_name}: {self.reason}\n"
            f"model {self.config.model.model}, mesh {list(self.config.model.mesh_shape)}"
        )


def find_machine() -> Machine:
    """Chooses the configuration that suits the devices, and a model that can be had.

    The secret HF_TOKEN of Kaggle or Colab is put into the environment, where the library of
    Hugging Face looks for it. A Gemma that is attached to a Kaggle notebook needs none.
    """
    import jax

    from gemma2_grpo.runtime.devices import start_jax

    # Without ipywidgets tqdm warns when it is imported, although no bar of its is shown here.
    warnings.filterwarnings("ignore", "IProgress not found")
    host = _host()
    _take_secret(host)
    start_jax(print)
    kind, count = jax.default_backend(), jax.local_device_count()
    devices = f"{count} x {jax.local_devices()[0].device_kind}"
    names = _FLAGSHIPS.get(kind)
    if names is None:
        why = "no TPU and no GPU; in Kaggle's or Colab's settings, choose an accelerator"
        return Machine(host, devices, _EMBEDDED, load_config(_EMBEDDED), why)
    configs = {name: load_config(name) for name in names}
    models = {name: config.model.model for name, config in configs.items()}
    name = next((name for name in names if _can_be_had(models[name])), None)
    if name is None:
        why = (
            f"{' and '.join(models.values())} cannot be had; attach the model google/gemma-2 or "
            f"google/gemma-3 on Kaggle, or accept its licence and add the secret {TOKEN}"
        )
        return Machine(host, devices, _EMBEDDED, load_config(_EMBEDDED), why)
    config = configs[name]
    if math.prod(config.model.mesh_shape) != count:
        shape = mesh_for(count, kv_heads(config.model.model))
        config = changed(config, mesh_shape=shape)
    return Machine(host, devices, name, config, "the flagship's recipe, on these devices")


def changed(config: Config, **fields: Any) -> Config:
    """A configuration with other values of some fields, whichever section they are in; checked.

    Raises:
        UserError: for a field that does not exist, or a value that cannot be.
    """
    return check(replaced(config, **fields))


def show_report(path: Path, height: int = 900) -> object:
    """A report inside of a notebook's page, apart from it: its own styles, no scripts."""
    from html import escape

    from IPython.display import HTML

    page = escape(path.read_text(encoding="utf-8"), quote=True)
    style = f"width:100%;height:{height}px;border:0"
    return HTML(f'<div><iframe sandbox srcdoc="{page}" style="{style}"></iframe></div>')


def _host() -> str:
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "Kaggle"
    with suppress(ImportError, ValueError):  # A parent package that is not there raises.
        if importlib.util.find_spec("google.colab"):
            return "Colab"
    return "this machine"


def _take_secret(host: str) -> None:
    """Puts the notebook's secret into the environment, if there is one; it is never printed."""
    if TOKEN in os.environ or host not in _SECRETS:
        return
    # Without the secret, or without leave to read it, both hosts raise errors of their own.
    with suppress(Exception):
        token = _SECRETS[host]()
        if token:
            os.environ[TOKEN] = token


def _kaggle_secret() -> str:
    from kaggle_secrets import UserSecretsClient  # type: ignore[import-not-found]

    return UserSecretsClient().get_secret(TOKEN)


def _colab_secret() -> str:
    from google.colab import userdata  # type: ignore[import-not-found]

    return userdata.get(TOKEN)


_SECRETS: dict[str, Callable[[], str]] = {"Kaggle": _kaggle_secret, "Colab": _colab_secret}


def _can_be_had(model: str) -> bool:
    """Whether a model is attached, in a cache, or can be asked for with a token."""
    from huggingface_hub import get_token

    from gemma2_grpo.model.hub.find import check_model

    if get_token():
        return True
    try:
        check_model(model)
    except UserError:
        return False
    return True
