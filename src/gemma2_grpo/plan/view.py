"""A plan for a terminal of 80 columns."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from gemma2_grpo.config import Config

if TYPE_CHECKING:
    from gemma2_grpo.plan.plan import Plan

_GIB = 1 << 30


def print_plan(plan: "Plan", config: Config, config_name: str, console: Console) -> None:
    """Prints memory by program, where it goes, the time and the verdict."""
    rollout = config.rollout
    console.print(
        f"{config_name} on {plan.target}: {plan.chips} chip{'s' if plan.chips > 1 else ''}, mesh "
        f"{' x '.join(map(str, config.model.mesh_shape))} (fsdp x tp), "
        f"{rollout.prompts_per_step} prompts x {rollout.num_generations} completions, "
        f"{rollout.max_prompt_tokens} + {rollout.max_completion_tokens} tokens",
        soft_wrap=True,
    )
    proof = {
        "compiled": "Compiled ahead of time by the target's own compiler; nothing was run.",
        "estimate": "Estimated by formulas, not compiled; nothing was run.",
    }[plan.proof]
    console.print(proof, style="dim")
    if plan.proof == "estimate" and plan.is_provable:
        console.print("For the proof by its compiler: pip install libtpu", style="dim")
    console.print(_programs(plan))
    console.print(_parts(plan))
    if plan.seconds_per_step is not None:
        console.print(_work(plan))
    if any(row.get("collectives", ()) is None for row in plan.programs):
        console.print(
            "What moves between chips cannot be read from this compiler's programs, and is not in "
            "the time."
        )
    _verdict(plan, config, console)


def _programs(plan: "Plan") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Memory of a chip, GiB", title_justify="left")
    table.add_column("program", no_wrap=True)
    is_compiled = plan.proof == "compiled"
    heads = ["arguments", "scratch", "peak", "run's peak", "moved"]
    for name in heads if is_compiled else ["run's peak"]:
        table.add_column(name, justify="right")
    for row in plan.programs:
        run_peak = _gib(row["run_peak"]) + ("" if row["fits"] else " !")
        if not is_compiled:
            table.add_row(row["name"], run_peak)
            continue
        collectives = row["collectives"]
        moved = sum(size for _, size in collectives.values()) if collectives is not None else None
        details = [row["arguments"], row["temporaries"], row["peak"], moved]
        if not row["arguments"]:  # Refused by the compiler, which says no more than its peak.
            details = [None, None, row["peak"], None]
        *sizes, links = (_gib(size) if size is not None else "" for size in details)
        table.add_row(row["name"], *sizes, run_peak, links)
    return table


def _parts(plan: "Plan") -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"where it goes at the peak, in {plan.peak_program}", no_wrap=True)
    table.add_column("GiB", justify="right")
    for name, size in plan.parts.items():
        table.add_row(name, _gib(size))
    table.add_row("together", _gib(plan.peak_bytes))
    if plan.memory_bytes:
        table.add_row("of", _gib(plan.memory_bytes))
    return table


def _work(plan: "Plan") -> Table:
    title = f"A step, completions of {plan.mean_completion_tokens} tokens on average"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("part")
    for name in ("PFLOP", "TB moved", "floor, s", "estimate, s"):
        table.add_column(name, justify="right")
    for row in plan.work:
        table.add_row(
            row["name"],
            f"{row['operations'] / 1e15:.3f}",
            f"{row['bytes'] / 1e12:.2f}",
            f"{row['floor_seconds']:.2f}",
            f"{row['seconds']:.2f}",
        )
    return table


def _verdict(plan: "Plan", config: Config, console: Console) -> None:
    from gemma2_grpo.plan.plan import options

    if plan.seconds_per_step is not None and plan.hours is not None:
        console.print(
            f"About {plan.seconds_per_step:.1f} s a step, {plan.hours:.1f} h for "
            f"{config.run.max_steps} steps, of {plan.budget_hours:g} h: an estimate, with "
            "measuring and compiling to come on top."
        )
    fits = "It fits" if plan.fits else "It does not fit"
    join = "but" if plan.fits else "and"
    time = "" if plan.is_in_time else f", {join} would not finish in time"
    console.print(f"[bold]{fits}{time}.[/bold]")
    if plan.changes:
        console.print(f"The smallest change found: {options(plan.changes)}", soft_wrap=True)
    elif not (plan.fits and plan.is_in_time):
        console.print("Nothing was found that makes it fit and finish.")


def _gib(size: float) -> str:
    return f"{size / _GIB:.{2 if size >= _GIB / 10 else 3}f}"
