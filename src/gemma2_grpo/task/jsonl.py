"""One reader of JSON Lines, with a policy for damaged lines."""

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from gemma2_grpo.errors import UserError

Content = TypeVar("Content")

OnDamage = Callable[[str], object]
"""Callback for a damaged line, with its place and its fault; the line is left out."""


class Line(NamedTuple, Generic[Content]):
    """One line that could be read."""

    place: str
    """File and number of the line, for messages."""
    number: int
    """From 1, blank and damaged lines included."""
    start: int
    """Byte of the file at which the line begins."""
    content: Content


def refuse(fault: str) -> None:
    """Policy for files that people write: a damaged line is an error.

    Raises:
        UserError: with the place and the fault.
    """
    raise UserError(fault)


def skip(fault: str) -> None:
    """Policy for logs, which a full disk or a crash may damage: a damaged line is left out."""
    del fault


def read_jsonl(
    path: Path,
    parse: Callable[[bytes], Content],
    *,
    on_damage: OnDamage = refuse,
    is_log: bool = False,
) -> Iterator[Line[Content]]:
    """Reads a file line by line, with or without a byte order mark; blank lines are left out.

    Args:
        path: The file.
        parse: Makes the content of a line; raises ValueError for a damaged one.
        on_damage: `refuse`, `skip`, or a function of one's own, such as `faults.append`.
        is_log: A process appends to the file: a last line without its end is being written, or
            was cut off, and is left out without being damaged.

    Raises:
        OSError: if the file cannot be read.
    """
    end = 0
    # In bytes, because text has more line separators than JSON Lines.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start, end = end, end + len(line)
            content = line.removeprefix(BOM_UTF8).strip()
            if not content or (is_log and not line.endswith(b"\n")):
                continue
            place = f"{path}:{number}"
            try:
                parsed = parse(content)
            except ValueError as error:
                on_damage(f"{place}: {error}")
            else:
                yield Line(place, number, start, parsed)


def whole_bytes(path: Path) -> int:
    """Bytes of the lines of a log that have their end; what follows them was cut off."""
    with path.open("rb") as file:
        return sum(len(line) for line in file if line.endswith(b"\n"))


def json_object(fields: str) -> Callable[[bytes], dict[str, Any]]:
    """Makes a `parse` for files that people write: each line is a JSON object.

    The names of the required `fields` are for the error message.
    """

    def parse(line: bytes) -> dict[str, Any]:
        try:
            content = json.loads(line.decode())
        except UnicodeDecodeError:
            raise ValueError("not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error}); write one object a line") from None
        if not isinstance(content, dict):
            raise ValueError(f"not a JSON object; write one with {fields}")
        return content

    return parse
