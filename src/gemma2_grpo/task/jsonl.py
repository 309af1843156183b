"""JSON lines that a person has written: each a JSON object, or named with its fault."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma2_grpo.errors import UserError


def read_jsonl(path: Path, fields: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a JSONL file in UTF-8, with or without a byte order mark; blank lines are left out.

    Args:
        path: The file.
        fields: What an object needs, for the error message.

    Yields:
        Place (file and line), and the object.

    Raises:
        UserError: for a line that is no JSON object, naming file, line and mend.
        OSError: if the file cannot be read.
    """
    # In bytes, because text has more line separators than JSON Lines.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            content = line.removeprefix(BOM_UTF8).rstrip()
            if content:
                place = f"{path}:{number}"
                yield place, _parse(content, place, fields)


def _parse(line: bytes, place: str, fields: str) -> dict[str, Any]:
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error}); write one object a line") from None
    if not isinstance(content, dict):
        raise UserError(f"{place}: not a JSON object; write one with {fields}")
    return content
