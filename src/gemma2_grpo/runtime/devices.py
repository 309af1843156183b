"""JAX's devices: started in one place, so that one that is missing or in use is one line."""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.errors import UserError
from gemma2_grpo.runtime.memory import keep_freed_memory

OLDEST_JAX = (0, 10)
_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")
_PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")
_MISSING_LIBTPU = "Failed to open libtpu.so"
_EXTRAS = {
    "tpu": "install the extra for it, pip install -e '.[tpu]'",
    "cuda": "install the extra for it, pip install -e '.[cuda]', and see that nvidia-smi lists it",
    "rocm": "install JAX's plugin for ROCm",
}
_EXTRAS["gpu"] = _EXTRAS["cuda"]
# What JAX, libtpu and CUDA say when the software is there but the device cannot be had.
_FIXES = (
    (r"already in use|resource busy", "end the process that holds it"),
    (r"lockfile", "end the process that holds the TPU, or remove the lockfile if there is none"),
    (
        r"RESOURCE_EXHAUSTED|out of memory|no supported devices found for platform CUDA",
        "end the process that has its memory; nvidia-smi shows it",
    ),
    (r"driver", "update the NVIDIA driver; the extra cuda needs one for CUDA 13"),
    (r"No visible GPU|NO_DEVICE", "see that nvidia-smi lists it, and CUDA_VISIBLE_DEVICES too"),
)
_LONGEST_SAID = 240


def require_jax() -> None:
    """Refuses a JAX that is absent or too old, without importing it.

    Raises:
        UserError: naming the version and the fix.
    """
    wanted = ".".join(map(str, OLDEST_JAX))
    try:
        found = metadata.version("jax")
    except metadata.PackageNotFoundError:
        raise UserError(f"JAX is not installed; pip install 'jax>={wanted}'") from None
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_JAX:
        raise UserError(f"JAX {found} is too old; pip install 'jax>={wanted}'")


def start_jax(note: Callable[[str], None]) -> None:
    """Imports JAX and starts its backend; call it when all that needs no JAX has been checked.

    Otherwise the backend would start at the first array, in the middle of something.

    Args:
        note: Takes the lines in which JAX says why it does without an accelerator.

    Raises:
        UserError: if the backend does not start; it names the variable that asked for it.
    """
    keep_freed_memory()
    import jax

    try:
        with _heard() as lines:
            jax.local_devices()
    except Exception as error:  # JAX asserts that a backend is left, and plugins raise their own.
        raise UserError(_explain(error)) from None
    for line in lines:
        note(f"JAX: {line}")


def cpu_warning(model: ModelConfig, name: str) -> str | None:
    """Warning before a configuration for an accelerator trains on a CPU; else None.

    Such configurations compute in bfloat16, which CPUs only imitate: that holds for all presets,
    for files that were derived from them, and for the defaults.

    Args:
        model: Section `[model]` of the configuration.
        name: Name of the configuration.
    """
    import jax

    if model.dtype != "bfloat16" or jax.default_backend() != "cpu":
        return None
    variable = _asking()
    fix = (
        f"{variable} = {os.environ[variable]} asks for it; unset it"
        if variable
        else "install the extra of this machine, pip install -e '.[cuda]' or '.[tpu]'"
    )
    return (
        f'{name} is made for a GPU or TPU (dtype = "bfloat16"), and JAX found only a CPU, where '
        f"a model of 2B parameters takes weeks: {fix}. `gemma2-grpo train` alone trains a tiny "
        "model that suits a CPU."
    )


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects what JAX logs while it looks for devices; else it prints lines and tracebacks."""
    failures: list[str] = []
    warnings: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if text.startswith("Unable to initialize backend 'proxy'"):
            return False  # It reaches devices of another machine, which nobody asked for.
        if text.startswith("Unable to initialize backend") and _MISSING_LIBTPU not in text:
            failures.append(_said(text))
        elif record.levelno >= logging.WARNING:
            error = record.exc_info[1] if record.exc_info else ""
            warnings.append(_said(f"{text} {error}"))
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    level, lines = logger.level, list[str]()
    logger.addFilter(hear)
    logger.setLevel(logging.INFO)  # That a TPU is in use is no warning of JAX's.
    try:
        yield lines
    finally:
        logger.removeFilter(hear)
        logger.setLevel(level)
    # After a failure, JAX guesses in a warning that something is not installed.
    lines += failures or warnings


def _asking() -> str | None:
    """The environment variable that chooses the backend, if one is set."""
    return next((name for name in _VARIABLES if os.environ.get(name)), None)


def _explain(error: Exception) -> str:
    """Says which variable asked for a backend, what JAX said of it, and the fix."""
    variable, text = _asking(), str(error)
    asked = os.environ[variable] if variable else ""
    named = re.search(r"backend:? '?(.*?)['.]", text)
    platform = named[1] if named else asked
    if variable and platform not in asked.split(","):  # JAX has put rocm in place of gpu.
        platform = asked
    start = f"{variable} = {asked}" if variable else f"backend {platform}"
    if variable and platform not in _PLATFORMS:
        close = difflib.get_close_matches(platform.strip().lower(), _PLATFORMS, n=1)
        fix = f"did you mean {close[0]}?" if close else f"known are {', '.join(_PLATFORMS)}"
        return f"{start}: JAX knows no backend {platform!r}; {fix}"
    is_absent = re.search("list of known backends|Unknown backend", text) or not text
    state = (
        "JAX finds no such device" if is_absent else f"the device does not start ({_said(text)})"
    )
    fixes = (fix for words, fix in _FIXES if re.search(words, text, re.IGNORECASE))
    fix = next(fixes, _EXTRAS.get(platform, "see what JAX says"))
    other = f"unset {variable} to run on what is here" if variable else "set JAX_PLATFORMS=cpu"
    return f"{start}: {state}; {fix}, or {other}"


def _said(text: str) -> str:
    """A message of JAX's in one line, without what is said around it."""
    text = re.sub(r"^Unable to initialize backend '.*?': |\((set|you may need).*\)$", "", text)
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_SAID else f"{line[:_LONGEST_SAID]} ..."
