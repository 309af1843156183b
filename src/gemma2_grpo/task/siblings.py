"""Modules that a user's reward file imports from its own folder: found, isolated and hashed."""

import ast
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class Siblings:
    """Lets a Python file import its neighbours while its own code runs.

    Nothing else sees them: outside of `importable`, neither the folder nor a module of it can be
    found, so that two files may each have a neighbour of the same name, and a `jax.py` next to a
    file is not taken for JAX. The standard library and this package come first.
    """

    def __init__(self, file: Path) -> None:
        """Takes the file, whose neighbours are in its folder."""
        self._file = file.resolve()
        self._names: set[str] = set()
        self._modules: dict[str, ModuleType] = {}
        PathFinder.invalidate_caches()  # A neighbour may be new.

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Runs the file, or a function of it, with its neighbours importable."""
        hidden = {name: sys.modules[name] for name in self._modules if name in sys.modules}
        sys.modules.update(self._modules)
        # First, because what is installed must not hide a neighbour of the same name.
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            for name in [name for name in sys.modules if name.partition(".")[0] in self._names]:
                self._modules[name] = sys.modules.pop(name)
            sys.modules.update(hidden)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Finds a neighbour, as `importlib` asks for it."""
        del target
        if path is not None or self._is_reserved(name):
            return None
        spec = PathFinder.find_spec(name, [str(self._file.parent)])
        # Any folder is a package of a kind: a folder `wandb` with logs must not hide wandb.
        if spec and not spec.has_location and PathFinder.find_spec(name):
            return None
        if spec:
            self._names.add(name)
        return spec

    def sha256(self) -> str:
        """Hash of the file and of all neighbours that it imports, also within its functions.

        A file that imports none has the hash of its bytes.
        """
        files = self._imported()
        if len(files) == 1:
            return hashlib.sha256(self._file.read_bytes()).hexdigest()
        digest = hashlib.sha256()
        for file in files:
            name = file.relative_to(self._file.parent).as_posix()
            digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()

    def _imported(self) -> list[Path]:
        """The file and what it imports from its folder, of a package all files; in order."""
        found, left = {self._file}, [self._file]
        while left:
            new = {path for name in _imports(left.pop()) for path in self._files(name)} - found
            found |= new
            left += new
        return sorted(found)

    def _files(self, name: str) -> list[Path]:
        if self._is_reserved(name):
            return []
        module = self._file.parent / f"{name}.py"
        package = self._file.parent / name
        if (package / "__init__.py").is_file() or not module.is_file():
            return sorted(package.rglob("*.py"))
        return [module]

    @staticmethod
    def _is_reserved(name: str) -> bool:
        return name in sys.stdlib_module_names or name == __name__.partition(".")[0]


def _imports(file: Path) -> Iterator[str]:
    """First names of all modules that a file imports; none where it is not Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
