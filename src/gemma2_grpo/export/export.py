"""A run as a directory that transformers or PEFT loads, with a model card."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gemma2_grpo.errors import UserError
from gemma2_grpo.export.verify import (
    NOT_VERIFIED,
    Verify,
    check_prompts,
    obstacle,
    verify_export,
)
from gemma2_grpo.run.files import check_version
from gemma2_grpo.run.source import Opened, Source, find_source, open_source, open_source_files
from gemma2_grpo.runtime.atomic import check_target, staged

Format = Literal["merged", "peft"]
Dtype = Literal["bfloat16", "float32"]

# Configuration, tokenizer and card.
_BYTES_BESIDE_WEIGHTS = 50_000_000


@dataclass(frozen=True)
class Wanted:
    """Files of an export."""

    format: Format
    dtype: str
    max_shard_bytes: int
    base_path: str
    """From where PEFT loads the base."""
    verify: Verify
    unverified: str | None
    """Why it is not run in transformers; None if it is."""


def find_run(name: str) -> Source:
    """The source of a run directory.

    Raises:
        UserError: for what is no run, or has trained nothing yet.
    """
    path = Path(name).expanduser()
    if not (path / "config.toml").is_file():
        what = "is no run (no config.toml in it)" if path.is_dir() else "no such directory"
        raise UserError(f"run {name}: {what}; give the directory of a run, such as runs/tiny")
    check_version(path)  # The card has what was measured.
    return find_source(name)


def open_run(
    source: Source,
    to: Path,
    format: Format,  # noqa: A002
    dtype: Dtype | None,
    max_shard_gb: float,
    *,
    verify: Verify,
) -> tuple[Opened, Wanted]:
    """Loads base and adapters, once it is known what will be written and that it fits."""
    from gemma2_grpo.model.hub.find import hub_id
    from gemma2_grpo.model.layout import adapter_parameters, tensor_shapes
    from gemma2_grpo.model.load import stored_dtype
    from gemma2_grpo.model.save import host_dtype

    model = source.config.model
    files = open_source_files(source)
    stored, architecture = stored_dtype(files.directory), files.architecture
    kept = dtype or (stored if format == "merged" else "float32")
    base_path = hub_id(model.model) or str(files.directory.resolve())
    parameters = sum(map(math.prod, tensor_shapes(architecture).values()))
    unverified = "--verify never" if verify == "never" else None
    if verify == "auto":
        unverified = obstacle(format, parameters)
    wanted = Wanted(format, kept, int(max_shard_gb * 1e9), base_path, verify, unverified)
    # Keys and values have one A in a run and two in PEFT; twice the adapters is enough for both.
    written = (
        parameters if format == "merged" else 2 * adapter_parameters(architecture, model.lora_rank)
    )
    check_target(to, written * host_dtype(kept).itemsize + _BYTES_BESIDE_WEIGHTS)
    # Adapters are added to the base as it is stored, whatever the run computed in. Verifying
    # compares in float32, in which everything that is stored is the same.
    loaded = replace(files.config, dtype=stored if unverified else "float32")
    return open_source(source, replace(files, config=loaded)), wanted


def write_export(
    to: Path, source: Source, opened: Opened, wanted: Wanted, name: str
) -> Iterator[str]:
    """Writes the directory, which appears whole or not at all.

    Args:
        to: The directory.
        source: The run.
        opened: Its base and adapters.
        wanted: Options of the export.
        name: Name that transformers loads, for the card.

    Yields:
        Lines for the user.

    Raises:
        UserError: if it cannot be written, or differs from the policy.
    """
    from gemma2_grpo.export.model_card import Exported, render_card

    assert source.run is not None
    with staged(to) as folder:
        rounding, chat = _write(folder, opened, wanted)
        if wanted.verify != "never":
            check_prompts(folder, opened.files.tokenizer)
        verified = None
        if not wanted.unverified:
            verified = verify_export(folder, opened, wanted.format, wanted.dtype)
        texts = [chat, _describe_rounding(wanted, rounding), verified or NOT_VERIFIED]
        exported = Exported(
            run=source.run,
            config=source.config,
            steps=opened.steps,
            format=wanted.format,
            dtype=wanted.dtype,
            name=name,
            architecture=opened.files.architecture,
            verification="\n\n".join(filter(None, texts)),
        )
        (folder / "README.md").write_text(render_card(exported), encoding="utf-8")
    unverified = f"not compared with transformers: {wanted.unverified}"
    yield from filter(None, (*texts[:2], verified or unverified))
    yield f"{to}: {wanted.format}, {wanted.dtype}, after {opened.steps} steps"


def _write(folder: Path, opened: Opened, wanted: Wanted) -> tuple[float, str]:
    """Writes settings and weights, and reads them back.

    Returns:
        What `save_model` and `write_tokenizer` return.
    """
    from gemma2_grpo.model.save import check_written, save_peft, write_tokenizer

    if wanted.format == "merged":
        return write_merged(folder, opened, wanted.dtype, wanted.max_shard_bytes)
    assert opened.policy is not None  # A run has one.
    model = opened.config.model
    shapes = save_peft(opened.policy, folder, model, wanted.dtype, base=wanted.base_path)
    check_written(folder, shapes)
    return 0.0, write_tokenizer(folder, opened.files.directory)


def write_merged(
    folder: Path, opened: Opened, dtype: str, max_shard_bytes: int
) -> tuple[float, str]:
    """Writes a whole model, the adapters added to its base, and reads it back.

    Returns:
        What `save_model` and `write_settings` return.
    """
    from gemma2_grpo.model.layout import tensor_shapes
    from gemma2_grpo.model.save import check_written, save_model, write_settings

    assert opened.policy is not None  # A run and a saved adapter both have one.
    chat = write_settings(folder, opened.files.directory, dtype)
    rounding = save_model(
        opened.policy,
        folder,
        dtype,
        lora_scale=opened.config.model.lora_scale,
        max_shard_bytes=max_shard_bytes,
    )
    check_written(folder, tensor_shapes(opened.policy.config))
    return rounding, chat


def _describe_rounding(wanted: Wanted, rounding: float) -> str:
    if not rounding:
        return ""
    return (
        f"Rounding to {wanted.dtype} moved the adapted weights by {100 * rounding:.2g} % of what "
        "training changed in them; `--dtype float32` keeps it all."
    )
