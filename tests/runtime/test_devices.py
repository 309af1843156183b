"""A device that cannot be had is one line, and an accelerator's configuration warns on a CPU."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.presets import load_config
from gemma2_grpo.runtime import devices
from gemma2_grpo.runtime.devices import cpu_warning, start_jax

# What libtpu, CUDA and JAX say, in their own words.
TPU_IN_USE = (
    "ABORTED: The TPU is already in use by process with pid 2718466. Not attempting to load "
    "libtpu.so in this process."
)
TPU_BUSY = (
    "UNKNOWN: TPU initialization failed: open(/dev/vfio/0): Device or resource busy: Device or "
    "resource busy; Couldn't open iommu group /dev/vfio/0"
)
TPU_LOCKFILE = (
    "ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "
    '"$ sudo rm /tmp/libtpu_lockfile".'
)
NO_GPU = "FAILED_PRECONDITION: No visible GPU devices."
OLD_DRIVER = (
    "INTERNAL: no supported devices found: CUDA driver version is insufficient for CUDA runtime "
    "version"
)
NO_MEMORY = (
    "RESOURCE_EXHAUSTED: Failed to allocate 63.6GiB: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
)
BY_VARIABLE = " (set JAX_PLATFORMS='' to automatically choose an available backend)"

# Runs a command where JAX's backend fails to start with the given words.
FAILING = """
import sys
from jax._src import hardware_utils, xla_bridge
from gemma2_grpo.cli import main

platform, text, *command = sys.argv[1:]

def fail():
    raise RuntimeError(text)

hardware_utils.has_visible_nvidia_gpu = lambda: True
xla_bridge._backend_factories.pop(platform, None)
xla_bridge.register_backend_factory(platform, fail, priority=400, fail_quietly=platform == "tpu")
sys.exit(main(command))
"""


def run(
    words: Sequence[str], folder: Path, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    wanted = {**os.environ, "JAX_PLATFORMS": None, **variables}
    environment = {name: value for name, value in wanted.items() if value is not None}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


COMMANDS = {
    "train": ["train", "--max-steps", "1"],
    "sft": ["sft", "tiny", "--to", "made"],
    "evaluate": ["evaluate", "embedded", "--num-test-samples", "1"],
    "ask": ["ask", "embedded", "1 + 1?"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_each_command_says_in_one_line_that_there_is_no_gpu(
    command: list[str], tmp_path: Path
) -> None:
    done = run(["-m", "gemma2_grpo.cli", *command], tmp_path, JAX_PLATFORMS="cuda")
    assert done.returncode == 2
    assert done.stderr == (
        "error: JAX_PLATFORMS = cuda: JAX finds no such device; install the extra for it, "
        "pip install -e '.[cuda]', and see that nvidia-smi lists it, or unset JAX_PLATFORMS to run "
        "on what is here\n"
    )
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    ("variables", "found", "fix"),
    [
        ({"JAX_PLATFORMS": "tpu"}, "libtpu.so: cannot open shared object", ".[tpu]"),
        ({"JAX_PLATFORMS": "cpu,tpu"}, "JAX_PLATFORMS = cpu,tpu: ", ".[tpu]"),
        ({"JAX_PLATFORMS": "gpu"}, "JAX_PLATFORMS = gpu: JAX finds no such device", ".[cuda]"),
        ({"JAX_PLATFORMS": "rocm"}, "JAX finds no such device", "plugin for ROCm"),
        ({"JAX_PLATFORMS": "cud"}, "JAX knows no backend 'cud'", "did you mean cuda?"),
        ({"JAX_PLATFORMS": "cpu, cuda"}, "no backend ' cuda'", "did you mean cuda?"),
        ({"JAX_PLATFORMS": "abacus"}, "'abacus'", "known are cpu, cuda, gpu, rocm, tpu"),
        ({"JAX_PLATFORM_NAME": "gpu"}, "JAX_PLATFORM_NAME = gpu: JAX finds no", ".[cuda]"),
    ],
    ids=str,
)
def test_what_was_asked_for_is_named_with_the_fix(
    variables: dict[str, str], found: str, fix: str, tmp_path: Path
) -> None:
    start = "from gemma2_grpo.runtime.devices import start_jax; start_jax(print)"
    done = run(["-c", start], tmp_path, **variables)
    *_, last = done.stderr.splitlines()
    assert last.startswith("gemma2_grpo.errors.UserError: ") and found in last and fix in last
    assert "During handling" not in done.stderr


@pytest.mark.parametrize(
    ("platform", "text", "fix"),
    [
        ("tpu", TPU_IN_USE, "end the process that holds it"),
        ("tpu", TPU_BUSY, "end the process that holds it"),
        ("tpu", TPU_LOCKFILE, "or remove the lockfile"),
        ("cuda", NO_GPU, "see that nvidia-smi lists it"),
        ("cuda", OLD_DRIVER, "update the NVIDIA driver"),
        ("cuda", NO_MEMORY, "end the process that has its memory"),
        (
            "tpu",
            "something of a later version",
            "install the extra for it, pip install -e '.[tpu]'",
        ),
    ],
)
def test_the_librarys_own_words_are_kept(
    platform: str, text: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    error = RuntimeError(f"Unable to initialize backend '{platform}': {text}{BY_VARIABLE}")
    line = devices._explain(error)
    assert line.startswith(f"JAX_PLATFORMS = {platform}: the device does not start ({text}); ")
    assert fix in line and line.endswith("or unset JAX_PLATFORMS to run on what is here")


def test_a_notebook_says_it_in_one_line(tmp_path: Path) -> None:
    cell = "from gemma2_grpo.commands.notebook import find_machine; find_machine()"
    shell = "from IPython.core.interactiveshell import InteractiveShell as S; import sys"
    words = ["-c", f"{shell}; S.instance().run_cell(sys.argv[1])", cell]
    done = run(words, tmp_path, JAX_PLATFORMS="cuda", IPYTHONDIR=str(tmp_path))
    assert done.stdout.startswith("error: JAX_PLATFORMS = cuda: JAX finds no such device; ")
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_tpu_in_use_is_one_line(tmp_path: Path) -> None:
    command = ["-c", FAILING, "tpu", TPU_IN_USE, "train", "--max-steps", "1"]
    done = run(command, tmp_path, JAX_PLATFORMS="tpu")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: JAX_PLATFORMS = tpu: the device does not start ({TPU_IN_USE}); end the process "
        "that holds it, or unset JAX_PLATFORMS to run on what is here\n"
    )


def test_a_plugin_that_fails_unasked_is_one_line(tmp_path: Path) -> None:
    """JAX refuses to go on where CUDA's plugin is installed and fails."""
    words = ["-c", FAILING.replace('platform == "tpu"', "False"), "cuda", OLD_DRIVER]
    done = run([*words, "ask", "embedded", "1 + 1?"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: backend cuda: the device does not start ({OLD_DRIVER})")
    assert done.stderr.endswith(
        "update the NVIDIA driver; the extra cuda needs one for CUDA 13, or set JAX_PLATFORMS=cpu\n"
    )


def test_a_preset_of_a_gpu_warns_of_a_cpu_and_says_why(tmp_path: Path) -> None:
    """JAX falls back in silence where a TPU is in use; the run then fails for want of a model."""
    command = ["train", "gemma2-2b-gpu", "--dataset", "procedural", "--model", "embedded"]
    sizes = ["--max-steps", "1", "--lora-modules", "none"]  # Ends before anything is computed.
    done = run(["-c", FAILING, "tpu", TPU_IN_USE, *command, *sizes], tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == f"JAX: {TPU_IN_USE}"
    assert lines[1].startswith(
        'warning: gemma2-2b-gpu is made for a GPU or TPU (dtype = "bfloat16"), and JAX found only '
        "a CPU"
    )
    assert "'.[cuda]'" in lines[1] and done.returncode == 2


@pytest.mark.parametrize("name", ["gemma2-2b-gpu", "gemma2-2b-v5e8", "gemma2-2b-gsm8k-strong"])
def test_presets_for_accelerators_warn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    text = cpu_warning(load_config(name).model, name)
    assert text and text.startswith(f"{name} is made for a GPU or TPU")
    assert "JAX_PLATFORMS = cpu asks for it; unset it" in text


def test_the_defaults_warn_and_the_tiny_preset_does_not() -> None:
    assert cpu_warning(ModelConfig(), "my.toml")
    assert cpu_warning(load_config("tiny").model, "tiny") is None


def test_started_devices_leave_jaxs_log_as_it_was() -> None:
    logger = logging.getLogger("jax._src.xla_bridge")
    before = logger.level, list(logger.filters)
    heard: list[str] = []
    start_jax(heard.append)
    assert heard == [] and (logger.level, list(logger.filters)) == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Unable to initialize backend 'proxy': The 'proxy' backend requires an address.", []),
        ("Unable to initialize backend 'cuda': no driver", ["no driver"]),
    ],
)
def test_what_jax_says_of_devices_that_nobody_asked_for_is_not_told(
    text: str, told: list[str]
) -> None:
    with devices._heard() as lines:
        logging.getLogger("jax._src.xla_bridge").info(text)
    assert lines == told
