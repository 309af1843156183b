"""Arrows between the rooms of the package point down only, and JAX stays in its room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma2_grpo

ROOMS = (
    "config",
    "presets",
    "task",
    "engine",
    "runs",
    "cli",
)  # a room may import itself and what precedes it
HEAVY = {"flax", "grain", "jax", "jaxlib", "optax", "orbax", "qwix", "tunix"}
SOURCE = Path(gemma2_grpo.__file__).parent
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def _imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yields each imported module, and whether importing the file imports it."""
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    late = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) not in late) for name in names)


def _faults(module: Path, source: str) -> list[str]:
    """Lists the imports that `module`, a path within the package, must not have."""
    room = module.with_suffix("").parts[0]
    if room == "__init__":
        return [name for name, _ in _imports(ast.parse(source)) if name.startswith("gemma2_grpo")]
    faults = []
    for name, at_once in _imports(ast.parse(source)):
        package, *rest = name.split(".")
        if package == "gemma2_grpo" and rest and rest[0] in ROOMS:
            if ROOMS.index(rest[0]) > ROOMS.index(room):
                faults.append(f"{room} imports {rest[0]}, upwards: {name}")
        elif package in HEAVY and (
            room in ("config", "presets", "task") or (room == "cli" and at_once)
        ):
            faults.append(f"{room} imports {name}")
    return faults


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_arrows_point_down(module: Path) -> None:
    assert _faults(module, (SOURCE / module).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("task/data.py", "from gemma2_grpo.engine import model"),
        ("task/data.py", "from gemma2_grpo import runs"),
        ("task/data.py", "def f():\n    import jax.numpy as jnp"),
        ("config.py", "import gemma2_grpo.task.prompts"),
        ("engine/loss.py", "def f():\n    from gemma2_grpo.runs.train import train"),
        ("runs/train.py", "from gemma2_grpo.cli import main"),
        ("cli.py", "from tunix.rl import common"),
        ("__init__.py", "from gemma2_grpo.config import Config"),
    ],
)
def test_a_planted_fault_is_found(module: str, source: str) -> None:
    assert _faults(Path(module), source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli.py", "def f():\n    from gemma2_grpo.runs.train import train\n    import jax"),
        ("runs/train.py", "from gemma2_grpo.engine import model\nimport jax"),
        ("task/data.py", "from gemma2_grpo.task.answers import grade\nimport gemma2_grpo"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert _faults(Path(module), source) == []
