"""`gemma2-grpo export`: what a run trained, for other tools to load."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gemma2_grpo.errors import UserError
from gemma2_grpo.export.hub import confirm_upload, upload
from gemma2_grpo.export.verify import (
    NOT_VERIFIED,
    Verify,
    check_packages,
    check_prompts,
    obstacle,
    verify_export,
)
from gemma2_grpo.run.console import Display
from gemma2_grpo.run.files import check_version
from gemma2_grpo.run.source import Opened, Source, find_source, open_source
from gemma2_grpo.runtime.atomic import check_empty, check_target, staged
from gemma2_grpo.runtime.devices import start_jax

Format = Literal["merged", "peft"]
Dtype = Literal["bfloat16", "float32"]

# Configuration, tokenizer and card.
_BYTES_BESIDE_WEIGHTS = 50_000_000


@dataclass(frozen=True)
class _Wanted:
    """What is to be written."""

    format: Format
    dtype: str
    max_shard_bytes: int
    base_path: str
    """From where PEFT loads the base."""
    unverified: str | None
    """Why it is not run in transformers; None if it is."""


def export(
    run: str,
    to: Path,
    *,
    format: Format = "merged",  # noqa: A002 (that of the option)
    dtype: Dtype | None = None,
    max_shard_gb: float = 5.0,
    verify: Verify = "auto",
    push: str | None = None,
    public: bool = False,
    yes: bool = False,
    display: Display | None = None,
) -> Path:
    """Writes what a run trained as a directory that transformers or PEFT loads, with a model card.

    Args:
        run: Run directory.
        to: Directory to write, absent or empty; it appears whole or not at all.
        format: `merged` adds the adapters into the weights, `peft` writes the adapters alone.
        dtype: Type to store; by default that of the base's files, and float32 for adapters.
        max_shard_gb: Largest size of a file of weights, in 1e9 bytes.
        verify: Run the export in transformers beside the policy, and write into the card how far
            they agree. `auto` does where its packages are installed, on a CPU with the memory; its
            prompts are compared wherever transformers is installed.
        push: Hugging Face repository to upload to.
        public: Let everybody see that repository.
        yes: Upload without asking.
        display: What shows the progress.

    Returns:
        The directory.

    Raises:
        UserError: for anything that the user can mend.
    """
    display = display or Display()
    source = _find_run(run)
    if not max_shard_gb > 0:
        raise UserError(f"--max-shard-gb = {max_shard_gb} must be greater than 0")
    check_empty(to)
    check_target(to)
    if verify == "always":
        check_packages(format)
    if push:
        confirm_upload(push, public=public, yes=yes)
    start_jax(display.note)
    display.note(f"loading {source.config.model.model}")
    opened, wanted = _open(source, to, format, dtype, max_shard_gb, verify=verify)
    with staged(to) as folder:
        rounding, chat = _write(folder, opened, wanted)
        if verify != "never":
            check_prompts(folder, opened.tokenizer)
        verified = None
        if not wanted.unverified:
            verified = verify_export(folder, opened, wanted.format, wanted.dtype)
        texts = [chat, _describe_rounding(wanted, rounding), verified or NOT_VERIFIED]
        _write_card(folder, source, opened, wanted, push or to.resolve().name, texts)
    unverified = f"not compared with transformers: {wanted.unverified}"
    for text in filter(None, (*texts[:2], verified or unverified)):
        display.note(text)
    display.note(f"{to}: {wanted.format}, {wanted.dtype}, after {opened.steps} steps")
    if push:
        display.note(f"uploaded to {upload(to, push, public=public)}")
    return to


def _find_run(name: str) -> Source:
    path = Path(name).expanduser()
    if not (path / "config.toml").is_file():
        what = "is no run (no config.toml in it)" if path.is_dir() else "no such directory"
        raise UserError(f"run {name}: {what}; give the directory of a run, such as runs/tiny")
    check_version(path)  # The card has what was measured.
    return find_source(name)


def _open(
    source: Source,
    to: Path,
    format: Format,  # noqa: A002
    dtype: Dtype | None,
    max_shard_gb: float,
    *,
    verify: Verify,
) -> tuple[Opened, _Wanted]:
    """Loads base and adapters, once it is known what will be written and that it fits."""
    from gemma2_grpo.model.architecture import read_architecture
    from gemma2_grpo.model.find import find_model, hub_id
    from gemma2_grpo.model.lora import max_adapter_parameters
    from gemma2_grpo.model.pretrained import stored_dtype, tensor_shapes
    from gemma2_grpo.model.save import host_dtype

    model = source.config.model
    directory = find_model(model.model)
    stored, architecture = stored_dtype(directory), read_architecture(directory)
    kept = dtype or (stored if format == "merged" else "float32")
    base_path = hub_id(model.model) or str(directory.resolve())
    parameters = sum(map(math.prod, tensor_shapes(architecture).values()))
    unverified = "--verify never" if verify == "never" else None
    if verify == "auto":
        unverified = obstacle(format, parameters)
    wanted = _Wanted(format, kept, int(max_shard_gb * 1e9), base_path, unverified)
    # Keys and values have one A in a run and two in PEFT; twice the adapters is enough for both.
    written = (
        parameters
        if format == "merged"
        else 2 * max_adapter_parameters(architecture, model.lora_rank)
    )
    check_target(to, written * host_dtype(kept).itemsize + _BYTES_BESIDE_WEIGHTS)
    # Adapters are added to the base as it is stored, whatever the run computed in. Verifying
    # compares in float32, in which everything that is stored is the same.
    loaded = replace(model, dtype=stored if unverified else "float32")
    return open_source(replace(source, config=replace(source.config, model=loaded))), wanted


def _write(folder: Path, opened: Opened, wanted: _Wanted) -> tuple[float, str]:
    """Writes settings and weights, and reads them back.

    Returns:
        What `save_model` and `write_tokenizer` return.
    """
    from gemma2_grpo.model.architecture import query_scale
    from gemma2_grpo.model.peft import save_peft
    from gemma2_grpo.model.pretrained import tensor_shapes
    from gemma2_grpo.model.save import (
        check_written,
        save_model,
        write_settings,
        write_tokenizer,
    )

    assert opened.policy is not None  # A run has one.
    model, scale = opened.config.model, query_scale(opened.directory)
    if wanted.format == "peft":
        base = wanted.base_path
        shapes = save_peft(opened.policy, folder, model, wanted.dtype, base=base, query_scale=scale)
        check_written(folder, shapes)
        return 0.0, write_tokenizer(folder, opened.directory)
    chat = write_settings(folder, opened.directory, wanted.dtype)
    rounding = save_model(
        opened.policy,
        folder,
        wanted.dtype,
        query_scale=scale,
        lora_scale=model.lora_scale,
        max_shard_bytes=wanted.max_shard_bytes,
    )
    check_written(folder, tensor_shapes(opened.policy.config))
    return rounding, chat


def _describe_rounding(wanted: _Wanted, rounding: float) -> str:
    if not rounding:
        return ""
    return (
        f"Rounding to {wanted.dtype} moved the adapted weights by {100 * rounding:.2g} % of what "
        "training changed in them; `--dtype float32` keeps it all."
    )


def _write_card(
    folder: Path, source: Source, opened: Opened, wanted: _Wanted, name: str, texts: Sequence[str]
) -> None:
    from gemma2_grpo.export.model_card import Exported, render_card

    assert source.run is not None
    card = render_card(
        Exported(
            run=source.run,
            config=source.config,
            steps=opened.steps,
            format=wanted.format,
            dtype=wanted.dtype,
            name=name,
            verification="\n\n".join(filter(None, texts)),
        )
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
