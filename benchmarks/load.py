"""Loading Gemma 2 2B: host memory and seconds of this package's loader and of Tunix's.

python -m benchmarks.load
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from benchmarks.command import status_of
from benchmarks.meter import peak_rss_bytes
from benchmarks.model_files import write_config
from benchmarks.processes import call
from benchmarks.workload import PRESETS, Sizes

Loader = Literal["ours", "tunix"]
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class Load:
    """Loads a checkpoint of random weights by each loader, in a fresh process each."""

    loaders: tuple[Loader, ...] = ("ours", "tunix")
    shards: int = 4
    """Files of the checkpoint."""
    mesh: tuple[int, int] = (2, 4)
    """Devices along (fsdp, tp); on a CPU they are virtual."""
    layers: int | None = None
    """Fewer layers than Gemma 2 2B has."""
    vocab: int | None = None
    """A smaller vocabulary than Gemma 2 2B has."""
    folder: Path | None = None
    """Where the temporary checkpoint of 5.2 GB is written; by default where temporary files go."""


@dataclass(frozen=True)
class Cost:
    """What loading took, beyond the process as it was before."""

    seconds: float
    array_bytes: int
    """Of the loaded weights, which are in host memory, since the devices are CPUs."""
    anonymous_bytes: int
    """Most anonymous memory at one time, in which arrays and copies lie and mapped files do not."""
    rss_bytes: int
    """Most resident memory of the process at one time, mapped files and imports included."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status; users' mistakes are one line and 2."""
    command = tyro.cli(Load, args=arguments, prog="python -m benchmarks.load", description=__doc__)
    return status_of(run, command)


def run(command: Load, console: Console, progress: Console) -> None:
    """Writes the checkpoint, loads it by each loader and prints the table."""
    # Weights on an accelerator would not be in the host memory that is measured.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={math.prod(command.mesh)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    given = {"layers": command.layers, "vocab": command.vocab}
    sizes = dataclasses.replace(
        PRESETS["gemma2-2b"], **{name: value for name, value in given.items() if value}
    )
    costs = {}
    with tempfile.TemporaryDirectory(prefix="gemma2-grpo-load-", dir=command.folder) as name:
        directory = Path(name)
        progress.print(f"writing {command.shards} shards", style="dim")
        stored = write_checkpoint(directory, sizes, command.shards)
        for loader in command.loaders:
            progress.print(f"loading: {loader}", style="dim")
            log = directory / "log"
            costs[loader] = call(loader, log, measure, loader, directory, command.mesh)
    console.print(
        f"{stored / 1e9:.2f} GB of bfloat16 weights in {command.shards} shards, "
        f"mesh {command.mesh[0]} x {command.mesh[1]}",
        style="dim",
    )
    console.print(make_table(costs))


def write_checkpoint(directory: Path, sizes: Sizes, shards: int) -> int:
    """Writes random weights in bfloat16, with an index; returns how many bytes they take.

    A shard is drawn and written before the next one, so that no more than one is in memory.
    """
    from gemma2_grpo.engine.model import read_architecture
    from gemma2_grpo.engine.pretrained import tensor_shapes

    write_config(directory, sizes)
    shapes = tensor_shapes(read_architecture(directory))
    total, random = sum(2 * math.prod(shape) for shape in shapes.values()), np.random.default_rng(0)
    where, written = {}, 0
    for name, shape in shapes.items():
        number = written * shards // total + 1
        where[name] = f"model-{number:05d}-of-{shards:05d}.safetensors"
        written += 2 * math.prod(shape)
    for file in dict.fromkeys(where.values()):
        chosen = {name: _draw(random, shapes[name]) for name in shapes if where[name] == file}
        save_file(chosen, directory / file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _draw(random: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """A million normal numbers over and over, since more would take minutes."""
    numbers = random.standard_normal(min(math.prod(shape), 2**20), np.float32)
    return np.resize(numbers.astype(ml_dtypes.bfloat16), tuple(shape))


def measure(loader: Loader, directory: Path, mesh_shape: tuple[int, int]) -> Cost:
    """Loads the checkpoint; runs in a process of its own."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.gemma import params_safetensors

    from gemma2_grpo.engine.model import load_weights, make_mesh, read_architecture

    mesh = make_mesh(mesh_shape)  # Starts the backend.
    with watching_anonymous_memory() as most:
        before, started = _anonymous_bytes(), time.perf_counter()
        if loader == "ours":
            model = load_weights(directory, "bfloat16", mesh)
        else:
            model = params_safetensors.create_model_from_safe_tensors(
                str(directory), read_architecture(directory), mesh, jnp.dtype("bfloat16")
            )
        leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        seconds = time.perf_counter() - started
    return Cost(
        seconds=seconds,
        array_bytes=sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards),
        anonymous_bytes=most[0] - before,
        rss_bytes=peak_rss_bytes(),
    )


@contextmanager
def watching_anonymous_memory() -> Iterator[list[int]]:
    """Yields a list whose one entry is the most anonymous memory of the process so far."""
    most, is_over = [_anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not is_over.wait(_SAMPLE_SECONDS):
            most[0] = max(most[0], _anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        is_over.set()
        thread.join()


def _anonymous_bytes() -> int:
    """Resident memory that is no mapped file; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def make_table(costs: dict[Loader, Cost]) -> Table:
    """The costs side by side."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in costs:
        table.add_column({"ours": "this package", "tunix": "Tunix"}[name], justify="right")
    rows = {
        "weights, GB": lambda cost: f"{cost.array_bytes / 1e9:.2f}",
        "peak anonymous memory, GB": lambda cost: f"{cost.anonymous_bytes / 1e9:.2f}",
        "  beyond the weights, GB": lambda cost: (
            f"{(cost.anonymous_bytes - cost.array_bytes) / 1e9:.2f}"
        ),
        "peak RSS with mapped files, GB": lambda cost: f"{cost.rss_bytes / 1e9:.2f}",
        "seconds": lambda cost: f"{cost.seconds:.1f}",
    }
    for label, show in rows.items():
        table.add_row(label, *(show(cost) for cost in costs.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
