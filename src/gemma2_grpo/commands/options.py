"""Types of command-line options: the fields of a dataclass, read by tyro."""

from pathlib import Path
from typing import Annotated, TypeVar

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

T = TypeVar("T")
Sections = Annotated[OmitArgPrefixes[T], arg(name="")]
"""A configuration whose fields are options without a prefix: `--max-steps`."""
Flag = FlagCreatePairsOff[bool]
"""An option that is false unless given, without a `--no-` form."""
ConfigName = Annotated[Positional[str], arg(metavar="[CONFIG]")]
Source = Annotated[Positional[str], arg(metavar="RUN|MODEL")]
Directory = Annotated[Path | None, arg(metavar="DIR")]
Name = Annotated[str | None, arg(metavar="NAME")]
