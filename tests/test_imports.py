"""Arrows between the rooms of the package point down only, and JAX stays in its room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma2_grpo

# A room may import itself and what precedes it; those of one line know nothing of each other.
ORDER = (
    ("errors",),
    ("ranges",),
    ("config",),
    ("checks",),
    ("presets",),
    ("task",),
    ("runtime",),
    ("model",),
    ("sampling",),
    ("training",),
    ("run",),
    ("report",),
    ("export", "plan", "launch"),
    ("commands",),
    ("cli_errors", "cli_help"),
    ("cli",),
)
LEVELS = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
LIGHT = ("errors", "ranges", "config", "checks", "presets", "task")
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
        if package == "gemma2_grpo" and rest and rest[0] in LEVELS:
            if rest[0] != room and LEVELS[rest[0]] >= LEVELS[room]:
                faults.append(f"{room} imports {rest[0]}, upwards: {name}")
        elif package in HEAVY and (room in LIGHT or (room == "cli" and at_once)):
            faults.append(f"{room} imports {name}")
    return faults


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_arrows_point_down(module: Path) -> None:
    assert _faults(module, (SOURCE / module).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("room", LEVELS)
def test_no_room_is_missing_and_each_upward_arrow_is_found(room: str) -> None:
    assert (SOURCE / room).is_dir() or (SOURCE / f"{room}.py").is_file()
    module = Path(room) / "module.py" if (SOURCE / room).is_dir() else Path(f"{room}.py")
    for other, level in LEVELS.items():
        for source in (
            f"from gemma2_grpo.{other}.module import name",
            f"def f():\n    from gemma2_grpo import {other}",
            f"import gemma2_grpo.{other}",
        ):
            is_upward = other != room and level >= LEVELS[room]
            assert bool(_faults(module, source)) == is_upward, (room, source)


def test_every_module_is_in_a_room() -> None:
    rooms = {module.with_suffix("").parts[0] for module in MODULES}
    assert rooms == {*LEVELS, "__init__"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("task/examples.py", "def f():\n    import jax.numpy as jnp"),
        ("cli.py", "from tunix.rl import common"),
        ("__init__.py", "from gemma2_grpo.config import Config"),
    ],
)
def test_a_planted_fault_is_found(module: str, source: str) -> None:
    assert _faults(Path(module), source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cli.py", "def f():\n    from gemma2_grpo.commands.train import train\n    import jax"),
        ("commands/train.py", "from gemma2_grpo.model import gemma\nimport jax"),
        ("task/examples.py", "from gemma2_grpo.task.answers import grade\nimport gemma2_grpo"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert _faults(Path(module), source) == []


@pytest.mark.parametrize("room", ["", *sorted(room for room in LEVELS if (SOURCE / room).is_dir())])
def test_no_room_is_crowded(room: str) -> None:
    assert len(list((SOURCE / room).glob("*.py"))) <= 16


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_and_functions_are_short(module: Path) -> None:
    source = (SOURCE / module).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 320
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert _code_lines(node) <= 50, node.name


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function with code in them: no docstrings, comments or blanks."""
    lines: set[int] = set()
    for node in ast.walk(function):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt | ast.expr) and not is_text:
            lines |= {node.lineno, node.end_lineno or node.lineno}
    text = {
        line
        for node in ast.walk(function)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return len(lines - text)
