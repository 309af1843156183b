"""What must be settled before JAX is imported, here and in the commands that tests start."""

import os
import shutil
import tempfile

import pytest

pytest_plugins = ["tests.fixtures.models", "tests.fixtures.runs", "tests.fixtures.written_run"]

# Meshes of up to 8 devices on any machine; tests that mean one device build a (1, 1) mesh.
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of a test's time goes into compiling; the same program is compiled once per session.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_own_cache = None
if _CACHE not in os.environ:
    _own_cache = os.environ[_CACHE] = tempfile.mkdtemp(prefix="gemma2-grpo-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure(config: pytest.Config) -> None:
    del config
    if _own_cache:
        shutil.rmtree(_own_cache, ignore_errors=True)
