"""Memory of a planned run: by the target's compiler, or by formulas."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platformdirs import user_cache_path

from gemma2_grpo.config import Config
from gemma2_grpo.run.schema import installed_versions

if TYPE_CHECKING:
    from gemma2_grpo.model.architecture import Architecture
    from gemma2_grpo.plan.footprint import Compiler, Footprint, Resident
    from gemma2_grpo.runtime.chips import Target

_PACKAGES = ("gemma2-grpo-reasoning", "jax", "libtpu", "google-tunix")
Progress = Callable[[str], None]
Row = dict[str, Any]
"""A row of a table of the plan, as `--json` prints it."""
_ROOMS = ("runtime", "model", "sampling", "training", "plan")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one chip, in bytes."""

    programs: list[Row]
    """The fields of each one's `Footprint`, if it was compiled; `run_peak`, the most that the run
    takes while it runs; and whether that fits."""
    parts: dict[str, int]
    """Where the memory goes when there is the least left."""
    peak_bytes: int
    peak_program: str
    fits: bool


def _cache_file(config: Config, target: str) -> Path:
    """Path of the cached memory of a configuration on a target, for these versions and sources."""
    sources = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((Path(__file__).parents[1] / room).glob("*.*")):
            sources.update(path.read_bytes())  # A checkout changes without its version.
    versions = installed_versions(_PACKAGES)
    sections = {
        name: values for name, values in asdict(config).items() if name not in ("data", "run")
    }
    parts = [sections, target, versions, sources.hexdigest()]
    text = json.dumps(parts, default=str, sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return user_cache_path("gemma2-grpo") / "plans" / f"{name}.json"


def kept_memory(config: Config, target: "Target", note: Progress, compiler: "Compiler") -> "Memory":
    """Memory as the compiler reports it, compiled now or read from the cache of plans."""
    file = _cache_file(config, target.name)
    try:
        return Memory(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = compiled_memory(config, target, compiler)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(found)), encoding="utf-8")
    except OSError as error:
        note(f"the plan is not kept: {error.strerror}")
    return found


def find_architecture(config: Config) -> "Architecture":
    """Architecture from the model's files; that of Google's models is known without any.

    Raises:
        UserError: if there is no such model, or it does not divide over the mesh.
    """
    from gemma2_grpo.model.architecture import known_architecture, read_architecture
    from gemma2_grpo.model.hub.find import find_model
    from gemma2_grpo.model.mesh import check_mesh_shape

    model = config.model
    # A directory may be called as it likes.
    known = None if Path(model.model).is_dir() else known_architecture(model.model)
    architecture = known or read_architecture(find_model(model.model, needs_weights=False))
    check_mesh_shape(architecture, model.mesh_shape, math.prod(model.mesh_shape))
    return architecture


def compiled_memory(config: Config, target: "Target", compiler: "Compiler") -> Memory:
    """Memory of the compiled programs, as the compiler reports it."""
    from gemma2_grpo.plan.footprint import resident, target_mesh
    from gemma2_grpo.plan.programs import Programs

    architecture = find_architecture(config)
    mesh = target_mesh(target, config.model.mesh_shape)
    programs = Programs(architecture, config, mesh)
    kept = resident(programs)
    footprints = [compiler(name, lower) for name, lower in programs.all().items()]
    peaks = {each.name: kept.peak(each) for each in footprints}
    limit = target.memory_bytes or math.inf
    rows = [
        asdict(each)
        | {"run_peak": peaks[each.name], "fits": each.fits and peaks[each.name] <= limit}
        for each in footprints
    ]
    # A program that does not compile is the one that matters, whatever the others add up to.
    worst = max(footprints, key=lambda each: (not each.fits, peaks[each.name]))
    return Memory(
        programs=rows,
        parts=_parts(config, architecture, kept, worst, peaks[worst.name]),
        peak_bytes=peaks[worst.name],
        peak_program=worst.name,
        fits=all(row["fits"] for row in rows),
    )


def _parts(
    config: Config,
    architecture: "Architecture",
    kept: "Resident",
    worst: "Footprint",
    peak: int,
) -> dict[str, int]:
    """Bytes by purpose while the most demanding program runs."""
    from gemma2_grpo.plan.costs import estimate_memory, model_sizes

    estimate = estimate_memory(model_sizes(architecture, config), architecture, config)
    parts = {
        "weights": kept.weights * (2 if worst.name in kept.merged else 1),
        "adapters and optimizer": kept.adapters + kept.moments,
        "weights brought together": int(estimate.gathered) if worst.name == "decode" else 0,
        "key-value cache": int(estimate.caches.get(worst.name, 0)),
        "logits": int(estimate.logits) if worst.name in ("reference", "update") else 0,
    }
    parts["activations and the rest"] = max(0, peak - sum(parts.values()))
    return {name: size for name, size in parts.items() if size}


def estimated_memory(config: Config, target: "Target") -> Memory:
    """Memory estimated by formulas."""
    from gemma2_grpo.plan.costs import estimate_memory, model_sizes

    architecture = find_architecture(config)
    estimate = estimate_memory(model_sizes(architecture, config), architecture, config)
    limit = target.memory_bytes or math.inf
    rows: list[Row] = [
        {"name": name, "run_peak": int(peak), "fits": peak <= limit}
        for name, peak in (("decode", estimate.decode), ("update", estimate.update))
    ]
    parts = {"weights": estimate.weights, "adapters and optimizer": estimate.trained}
    if estimate.decode > estimate.update:
        kept = estimate.weights + estimate.trained + estimate.sampling_copy
        is_growing = estimate.decode > kept + estimate.gathered + estimate.caches["decode"]
        gathered = 0.0 if is_growing else estimate.gathered
        parts |= {
            "weights with the adapters": estimate.sampling_copy,
            "weights brought together": gathered,
            "key-value cache": estimate.decode - kept - gathered,
        }
    else:
        parts |= {
            "weights with the adapters": estimate.update_copy,
            "gradients": estimate.trained / 3,
            "logits": estimate.logits,
            "activations": estimate.activations,
        }
    worst = max(rows, key=lambda row: row["run_peak"])
    return Memory(
        programs=rows,
        parts={name: int(size) for name, size in parts.items() if size},
        peak_bytes=worst["run_peak"],
        peak_program=worst["name"],
        fits=all(row["fits"] for row in rows),
    )
