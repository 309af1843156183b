"""Starting a run from what another one trained: its adapters become part of the base."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_grpo.config import replaced
from gemma2_grpo.errors import UserError

if TYPE_CHECKING:
    from gemma2_grpo.run.source import Source


def warm_start(place: str, to: Path, dtype: str, note: Callable[[str], None]) -> str:
    """The model that a run starts from: base and adapters of an earlier one, merged.

    Policy and reference both start there, and new adapters train from it. It is written once, in
    the type in which the new run computes, so that nothing is rounded away.

    Args:
        place: A run directory, a saved adapter's directory, or a whole model's.
        to: Where the merged model is written, unless `place` is a whole model.
        dtype: Type to store, `bfloat16` or `float32`.
        note: Takes a line for the user.

    Returns:
        The directory of the model.

    Raises:
        UserError: for what is none of these, or cannot be merged.
    """
    if (Path(place).expanduser() / "config.json").is_file():
        return place
    source = _find(place)
    if (to / "config.json").is_file():
        return str(to)
    from gemma2_grpo.export.export import write_merged
    from gemma2_grpo.model.save import MAX_SHARD_BYTES
    from gemma2_grpo.run.source import open_source
    from gemma2_grpo.runtime.atomic import check_target, staged
    from gemma2_grpo.runtime.devices import start_jax

    check_target(to)
    start_jax(note)
    note(f"merging {source.title} into {to}")
    opened = open_source(replace(source, config=replaced(source.config, dtype=dtype)))
    with staged(to) as folder:
        write_merged(folder, opened, dtype, MAX_SHARD_BYTES)
    return str(to)


def _find(place: str) -> "Source":
    """The run or the adapter in a directory, with its base."""
    from gemma2_grpo.model.adapter import ADAPTER_FILE, adapter_base
    from gemma2_grpo.run.source import find_source, with_adapter

    folder = Path(place).expanduser()
    if (folder / "config.toml").is_file():
        return find_source(place)
    if (folder / ADAPTER_FILE).is_file():
        return with_adapter(find_source(adapter_base(folder)), place)
    raise UserError(
        f"--init-from {place}: neither a run (no config.toml in it), nor an adapter (no "
        f"{ADAPTER_FILE}), nor a model (no config.json); name the run directory of `sft`"
    )
