"""Ranges of configuration fields as types, checked by pydantic and named in messages and docs."""

import re
from dataclasses import asdict
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from gemma2_grpo.errors import ConfigError


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"lora_modules: {pattern!r} is not a regular expression: {error}"
        ) from None
    return pattern


AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# A description is added to the message of a value that is out of range.
TopP = Annotated[float, Field(gt=0, le=1, description="1 keeps all tokens")]
MeshShape = Annotated[
    tuple[AtLeast1, AtLeast1], Field(strict=False, description="must have two positive sizes")
]
Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_compiled)], ...],
    Field(strict=False, min_length=1, description="must name at least one module to adapt"),
]


def demand(hint: Any) -> str:
    """The range of a field as text: `must be at least 1`; empty where every value will do."""
    infos = [
        info
        for part in (hint, *get_args(hint))
        if get_origin(part) is Annotated
        for info in part.__metadata__
        if isinstance(info, FieldInfo)
    ]
    # pydantic keeps each bound as a small dataclass such as Ge(ge=1).
    bounds = dict(item for info in infos for each in info.metadata for item in asdict(each).items())
    match bounds:
        case {"ge": low, "le": high}:
            text = f"must lie between {low} and {high}"
        case {"ge": low, "lt": high}:
            text = f"must lie between {low} and {high}, below {high}"
        case {"gt": low, "le": high}:
            text = f"must lie in ({low}, {high}]"
        case {"ge": low}:
            text = f"must be at least {low}"
        case {"gt": low}:
            text = f"must be greater than {low}"
        case _:
            text = ""
    return "; ".join(filter(None, [text, *(info.description for info in infos)]))
