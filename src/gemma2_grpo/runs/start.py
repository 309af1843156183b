"""Starting JAX, once everything that can be refused without it has been checked."""

from collections.abc import Callable

from gemma2_grpo.runs.host_memory import keep_freed_memory


def start_jax(note: Callable[[str], None]) -> None:
    """Imports JAX and starts its backend; what comes after this may rely on devices.

    Args:
        note: Takes the lines in which JAX says why it does without an accelerator.

    Raises:
        UserError: if the backend does not start.
    """
    keep_freed_memory()
    from gemma2_grpo.engine.devices import start_devices

    start_devices(note)
