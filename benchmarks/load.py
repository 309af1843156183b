"""What loading weights takes of the host: this package, and Tunix's own loader.

python -m benchmarks.load
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.command import status_of
from benchmarks.model_files import write_config
from benchmarks.workload import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Writes a checkpoint in the shapes of Gemma 2 2B and loads it, each time in a new process."""

    layers: int = 26
    """Fewer make it small enough to try anywhere; all take 5.2 GB of disk."""
    shards: int = 3
    mesh: tuple[int, int] = (2, 4)
    """Over virtual devices of the CPU, whose memory is the host's."""
    folder: Path | None = None
    """Where the checkpoint is written for the time; by default among temporary files."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one loader. Bytes."""

    seconds: float
    peak_bytes: int
    """Most memory of its own that the process took on while it loaded: pages of mapped files, which
    the system takes back as it needs, are not in it."""
    array_bytes: int
    """What the arrays hold that were loaded: on a TPU they would not be on the host."""

    @property
    def beside_bytes(self) -> int:
        """Memory of loading besides the arrays."""
        return self.peak_bytes - self.array_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status; users' mistakes are one line and 2."""
    command = tyro.cli(Load, args=arguments, prog="python -m benchmarks.load", description=__doc__)
    return status_of(run, command)


def run(command: Load, console: Console, progress: Console) -> None:
    """Writes, loads and prints."""
    devices = command.mesh[0] * command.mesh[1]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(dir=command.folder, prefix="gemma2-grpo-load-") as name:
        progress.print("writing the checkpoint", style="dim")
        _in_process(write_checkpoint, Path(name), command)
        costs = {}
        for system in ("ours", "tunix"):
            progress.print(f"loading: {system}", style="dim")
            costs[system] = _in_process(load, system, Path(name), command.mesh)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("", "seconds", "peak, GB", "arrays, GB", "besides, GB"):
        table.add_column(heading, justify="right" if heading else "left")
    for system, cost in costs.items():
        sizes = (cost.peak_bytes, cost.array_bytes, cost.beside_bytes)
        table.add_row(system, f"{cost.seconds:.1f}", *(f"{size / 1e9:.2f}" for size in sizes))
    console.print(table)


def _in_process(function, *arguments):
    """Calls a function in a fresh process and returns what it returns."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def write_checkpoint(folder: Path, command: Load) -> None:
    """Random bfloat16 tensors in the names and shapes of Gemma 2 2B, in several files."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from gemma2_grpo.model.architecture import read_architecture
    from gemma2_grpo.model.layout import tensor_shapes

    write_config(folder, dataclasses.replace(PRESETS["gemma2-2b"], layers=command.layers))
    shapes = tensor_shapes(read_architecture(folder))
    random, index = np.random.default_rng(0), {}
    names = list(shapes)
    for number in range(command.shards):
        file = f"model-{number + 1:05d}-of-{command.shards:05d}.safetensors"
        part = names[number :: command.shards]
        index |= dict.fromkeys(part, file)
        block = random.standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)
        save_file({name: np.resize(block, shapes[name]) for name in part}, folder / file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def load(system: str, folder: Path, shape: tuple[int, int]) -> Cost:
    """Loads the checkpoint onto a mesh in bfloat16."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.gemma import params_safetensors

    from gemma2_grpo.model.architecture import read_architecture
    from gemma2_grpo.model.load import load_weights
    from gemma2_grpo.model.mesh import make_mesh

    mesh = make_mesh(shape)
    jax.device_put(jnp.zeros(8))
    own = OwnMemory()
    started = time.perf_counter()
    if system == "ours":
        model = load_weights(folder, "bfloat16", mesh)
    else:
        model = params_safetensors.create_model_from_safe_tensors(
            str(folder), read_architecture(folder), mesh, jnp.bfloat16
        )
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    return Cost(time.perf_counter() - started, own.peak(), held)


class OwnMemory:
    """Watches how much memory of its own this process takes on (Linux)."""

    def __init__(self) -> None:
        self._before, self._most = _own_bytes(), 0
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._has_ended.wait(0.01):
            self._most = max(self._most, _own_bytes())

    def peak(self) -> int:
        """Stops watching; the most since the beginning, in bytes."""
        self._has_ended.set()
        self._thread.join()
        return max(self._most, _own_bytes()) - self._before


def _own_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
