"""The docs say what the package does."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from gemma2_grpo import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    for path, text in load_generator().pages().items():
        assert path.read_text() == text, f"python docs/generate.py would change {path.name}"


def commands(page: Path) -> Iterator[str]:
    """Our own commands in indented or fenced blocks, continued lines joined as a shell does."""
    text = re.sub(r"\\\n(?: {4})?", "", page.read_text())
    for line in re.findall(r"^(?: {4}|)(?:[^\n]* && )?(gemma2-grpo [^\n]*)$", text, re.MULTILINE):
        yield line.partition(" #")[0].strip()


def all_commands() -> list[tuple[str, str]]:
    return [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_every_command_of_the_docs_is_understood(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Names of commands, options and presets; files of the reader's own need not be there."""
    del page
    (tmp_path / "my.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    if "--help" in words:
        with pytest.raises(SystemExit):
            cli.parse(words)
        return
    own = {"CONFIG": "tiny", "RUN": "runs/tiny"}
    assert cli.parse([own.get(word, word) for word in words])


def test_commands_are_found() -> None:
    assert len(all_commands()) > 8


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def quoted_messages() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    bold = re.findall(r"\*\*(.+?)\*\*", page)
    return [quote for text in bold for quote in re.findall(r"`([^`]+)`", text) if " " in quote]


@pytest.mark.parametrize("message", quoted_messages())
def test_messages_of_the_troubleshooting_page_exist(message: str) -> None:
    """Each piece between the dots stands in the source, whatever lines it is broken into there."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    joined = re.sub(r"\{[^{}]*\}", "...", joined)
    for piece in message.split("..."):
        assert piece.strip() in joined, piece
