"""TOML presets and files: read, built into configurations, checked, compared."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from gemma2_grpo.checks import check, explain, is_out_of_range
from gemma2_grpo.config import Config, flat
from gemma2_grpo.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def preset_names() -> list[str]:
    """Names of the TOML files that the package ships."""
    folder = resources.files("gemma2_grpo") / "configs"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir())


def read_toml(name_or_path: str) -> dict[str, Any]:
    """Reads a shipped preset by name, or a TOML file by path.

    Raises:
        ConfigError: if there is no such preset or file, or it is not TOML.
    """
    shipped = resources.files("gemma2_grpo") / "configs" / f"{name_or_path}.toml"
    source = shipped if shipped.is_file() else Path(name_or_path)
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(
            f"config {name_or_path!r}: no such file or preset; "
            f"presets are {', '.join(preset_names())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config {name_or_path}: {error}") from None


def from_mapping(kind: type[ConfigT], values: Mapping[str, object], source: str) -> ConfigT:
    """Builds a configuration dataclass from nested values, types and names checked.

    Args:
        kind: The configuration dataclass.
        values: Nested values as TOML gives them; absent fields take their defaults.
        source: Name of their file, for the error message.

    Raises:
        ConfigError: naming the first wrong field.
    """
    try:
        # By way of JSON, where a list may stand for a tuple although checking is strict.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(
                f"config {source}: unknown field {name!r}{_nearest(kind, first['loc'])}"
            ) from None
        text = explain(kind, values, error)
        raise ConfigError(text if is_out_of_range(first) else f"config {source}: {text}") from None


def to_toml(config: Config) -> str:
    """A configuration as `from_mapping` reads it back, every field of it."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    """Nested values without None, which TOML cannot say; absent fields are None by default."""
    return {
        name: _without_none(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }


def load_config(name_or_path: str = "tiny") -> Config:
    """Loads and checks a preset or a TOML file.

    Raises:
        ConfigError: if it cannot be read or cannot run.
    """
    return check(from_mapping(Config, read_toml(name_or_path), name_or_path))


def nearest_preset(values: Mapping[str, object]) -> tuple[str, Config]:
    """The preset from which the fewest fields differ, with its name.

    Args:
        values: Fields without their sections; lists may stand for tuples.
    """

    def differing(preset: Config) -> int:
        own = json.loads(json.dumps(flat(preset)))
        given = json.loads(json.dumps(values, default=str))
        return sum(own.get(name) != given.get(name) for name in own | given)

    presets = [(name, load_config(name)) for name in preset_names()]
    return min(presets, key=lambda preset: differing(preset[1]))


def _nearest(kind: type, location: tuple[int | str, ...]) -> str:
    """Says where an unknown field belongs, what is spelled most alike, or what is known."""
    fields = get_type_hints(kind)
    for part in location[:-1]:
        fields = get_type_hints(fields[str(part)])
    name = str(location[-1])
    for section, section_kind in fields.items():
        if dataclasses.is_dataclass(section_kind) and name in get_type_hints(section_kind):
            return f"; it belongs in [{section}]"
    close = difflib.get_close_matches(name, fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(fields)}"
