"""Adapts how tyro parses options and shows them in `--help`."""

import dataclasses
from functools import cache, partial
from typing import Annotated, Any, get_args, get_type_hints

import tyro
from tyro.conf import arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

REGISTRY = ConstructorRegistry()


@REGISTRY.struct_rule
def _fields(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Options of a dataclass; their docstrings are one paragraph, empty defaults are hidden."""
    is_ours = info.type.__module__.startswith("gemma2_grpo.")  # tyro wraps them in one of its own.
    if not (is_ours and dataclasses.is_dataclass(info.type)):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    specs = []
    for each in dataclasses.fields(info.type):
        default = _default(each, info.default)
        hint: Any = hints[each.name]
        if default is None or default is False:
            hint = Annotated[hint, arg(help_behavior_hint="")]
        text = partial(_help, info.type, each.name)
        specs.append(StructFieldSpec(each.name, hint, default, helptext=text))
    return StructConstructorSpec(info.type, tuple(specs))


def _default(field: dataclasses.Field, instance: object) -> object:
    """The default of a field, that of an instance first."""
    if dataclasses.is_dataclass(instance):
        return getattr(instance, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING_NONPROP


def _help(kind: type, name: str) -> str | None:
    """The docstring of a field without its line breaks."""
    return _docstrings(kind).get(name)


@cache
def _docstrings(kind: type) -> dict[str, str]:
    import docstring_parser

    found = {}
    for each in reversed(kind.__mro__[:-1]):  # A command may take the options of another.
        for param in docstring_parser.parse_from_object(each).params:
            found[param.arg_name] = " ".join((param.description or "").split())
    return found


@REGISTRY.primitive_rule
def _may_be_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Shows `INT` instead of tyro's `{None}|INT` in help and errors."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if len(kinds) != 1 or type(None) not in get_args(info.type):
        return None
    of_value = ConstructorRegistry.get_primitive_spec(
        PrimitiveTypeInfo.make(kinds[0], info.markers)
    )
    if not isinstance(of_value, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        of_value,
        # `None` takes back what a TOML file sets.
        instance_from_str=lambda words: (
            None if words == ["None"] else of_value.instance_from_str(words)
        ),
        is_instance=lambda value: value is None or of_value.is_instance(value),
        str_from_instance=lambda value: (
            ["None"] if value is None else of_value.str_from_instance(value)
        ),
    )
