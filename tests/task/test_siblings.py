"""A reward file imports what is next to it, and nothing else sees that."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2_grpo.errors import UserError
from gemma2_grpo.task.scoring import Reward, load_reward


def load(folder: Path, main: str, **neighbours: str) -> tuple[Reward, str]:
    """Writes mine.py and its neighbours, and loads its function `mine`."""
    folder.mkdir(exist_ok=True)
    for name, text in {"mine.py": main, **neighbours}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return load_reward(f"{folder / 'mine.py'}:mine")


def value(reward: Reward) -> object:
    return reward(["q"], ["c"], ["a"])[0]


AT_ONCE = "from textutil import NUMBER\ndef mine(q, c, a):\n    return [NUMBER]\n"
LATE = "def mine(q, c, a):\n    import textutil\n    return [textutil.NUMBER]\n"


@pytest.mark.parametrize("main", [AT_ONCE, LATE], ids=["at once", "late"])
def test_a_neighbour_is_imported_and_does_not_stay(main: str, tmp_path: Path) -> None:
    reward, _ = load(tmp_path, main, **{"textutil.py": "NUMBER = 7\n"})
    path, found = list(sys.path), list(sys.meta_path)
    assert value(reward) == 7 and value(reward) == 7
    assert "textutil" not in sys.modules
    assert (sys.path, sys.meta_path) == (path, found)


@pytest.mark.parametrize("main", [AT_ONCE, LATE], ids=["at once", "late"])
def test_neighbours_of_the_same_name_are_kept_apart(main: str, tmp_path: Path) -> None:
    first, _ = load(tmp_path / "one", main, **{"textutil.py": "NUMBER = 1\n"})
    second, _ = load(tmp_path / "two", main, **{"textutil.py": "NUMBER = 2\n"})
    assert [value(first), value(second), value(first)] == [1, 2, 1]


def test_a_module_keeps_its_state_from_call_to_call(tmp_path: Path) -> None:
    main = "def mine(q, c, a):\n    import counter\n    return [counter.up()]\n"
    counter = "calls = 0\ndef up():\n    global calls\n    calls += 1\n    return calls\n"
    reward, _ = load(tmp_path, main, **{"counter.py": counter})
    assert [value(reward), value(reward), value(reward)] == [1, 2, 3]


def test_a_changed_neighbour_is_read_again_by_the_next_load(tmp_path: Path) -> None:
    before = load(tmp_path, AT_ONCE, **{"textutil.py": "NUMBER = 7\n"})
    after = load(tmp_path, AT_ONCE, **{"textutil.py": "NUMBER = 700\n"})
    assert (value(before[0]), value(after[0])) == (7, 700)


def test_packages_and_folders_without_init(tmp_path: Path) -> None:
    main = (
        "import words.count\nfrom plain.more import TEN\n"
        "def mine(q, c, a):\n    return [words.count.N + TEN]\n"
    )
    files = {
        "words/__init__.py": "from words.base import N\n",
        "words/base.py": "N = 5\n",
        "words/count.py": "from words import N\n",
        "plain/more.py": "TEN = 10\n",
    }
    reward, _ = load(tmp_path, main, **files)
    assert value(reward) == 15


def test_the_standard_library_and_this_package_come_first(tmp_path: Path) -> None:
    """Also where nothing has imported them yet, so in another process."""
    main = (
        "import random, gemma2_grpo\nimport colorsys\n"
        "def mine(q, c, a):\n    import wave\n"
        "    return [float(hasattr(random, 'random') and hasattr(colorsys, 'rgb_to_hsv')"
        " and hasattr(wave, 'open') and hasattr(gemma2_grpo, '__version__'))]\n"
    )
    names = ("random", "colorsys", "wave", "gemma2_grpo")
    load(tmp_path, main, **{f"{name}.py": "raise RuntimeError('shadowed')" for name in names})
    code = (
        "import sys; from gemma2_grpo.task.scoring import load_reward\n"
        "print(load_reward(sys.argv[1])[0](['q'], ['c'], ['a']))"
    )
    spec = f"{tmp_path / 'mine.py'}:mine"
    done = subprocess.run([sys.executable, "-c", code, spec], capture_output=True, text=True)
    assert done.stdout == "[1.0]\n", done.stderr


def test_what_others_import_is_not_hidden(tmp_path: Path) -> None:
    """A folder of logs is no package, and our own imports find what is installed."""
    main = "import jinja2\ndef mine(q, c, a):\n    return [float(hasattr(jinja2, 'Template'))]\n"
    (tmp_path / "jinja2").mkdir()
    sys.modules.pop("jinja2", None)
    reward, _ = load(tmp_path, main, **{"optax.py": "raise RuntimeError('hidden')\n"})
    assert value(reward) == 1
    import jinja2
    import optax

    assert hasattr(jinja2, "Template") and hasattr(optax, "adamw")


def test_a_neighbour_that_is_absent_or_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ModuleNotFoundError: No module named 'textutil'"):
        load(tmp_path / "a", AT_ONCE)
    with pytest.raises(UserError, match=r"mine\.py:mine': ZeroDivisionError: division by zero"):
        load(tmp_path / "b", AT_ONCE, **{"textutil.py": "NUMBER = 1 / 0\n"})
    assert not any("Siblings" in type(finder).__name__ for finder in sys.meta_path)


@pytest.mark.parametrize("main", [AT_ONCE, LATE], ids=["at once", "late"])
def test_the_hash_covers_all_that_is_imported_from_the_folder(main: str, tmp_path: Path) -> None:
    files = {"textutil.py": "import deep\nNUMBER = 7\n", "deep.py": "", "other.py": ""}
    _, before = load(tmp_path, main, **files)
    assert load(tmp_path, main, **files | {"other.py": "changed = 1\n"})[1] == before
    hashes = {load(tmp_path, main, **files | {name: "NUMBER = 8\n"})[1] for name in list(files)[:2]}
    assert len(hashes | {before}) == 3
    _, moved = load(tmp_path / "elsewhere", main, **files)
    assert moved == before


def test_the_hash_of_a_file_alone_is_that_of_its_bytes(tmp_path: Path) -> None:
    text = "import json\ndef mine(q, c, a):\n    return [1.0]\n"
    _, sha256 = load(tmp_path, text, **{"json.py": "", "textutil.py": ""})
    assert sha256 == hashlib.sha256(text.encode()).hexdigest()
