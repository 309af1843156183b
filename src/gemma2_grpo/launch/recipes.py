"""A training job as xpk, JobSet, Slurm and SkyPilot want it.

Sources of the templates: `parser/workload.py` and `core/docker_container.py` of
AI-Hypercomputer/xpk; the resource definition v1alpha2 of kubernetes-sigs/jobset and GKE's guides to
TPUs and Cloud Storage FUSE; the manual of sbatch and srun and NVIDIA pyxis; SkyPilot's YAML
specification.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from gemma2_grpo.launch.machines import Launcher
from gemma2_grpo.runtime.templates import templates_of

MOUNT = "/runs"
"""Directory at which the storage is mounted on every host."""
_TEMPLATES: dict[Launcher, str] = {
    "xpk": "xpk.sh.j2",
    "jobset": "jobset.yaml.j2",
    "slurm": "slurm.sh.j2",
    "skypilot": "skypilot.yaml.j2",
}
_SAME_FOR_ALL: dict[str, object] = {
    "image": "",
    "mount": MOUNT,
    "grace_seconds": 120,  # From SIGTERM to SIGKILL: for the rest of a step and a checkpoint.
    "max_restarts": 10,
    "user_error": 2,  # Exit status of what a restart would not correct.
    "checkpointed": 143,  # Exit status after SIGTERM; the same command resumes.
    "coordinator_port": 8476,
}
# Of a plain scalar in YAML, for certain, and what else than text some of these would be.
_PLAIN = re.compile(r"(--)?[A-Za-z/]([\w./:@-]*[\w./@-])?", re.ASCII)
_NOT_TEXT = re.compile(r"true|false|yes|no|on|off|null|y|n", re.IGNORECASE)


def render(
    launcher: Launcher, *, run: str, notes: Sequence[str], storage: str = "", **values: object
) -> str:
    """The recipe of one training run.

    Args:
        launcher: Whose recipe.
        run: The run directory.
        notes: Comments for the reader of the recipe.
        storage: Bucket, volume claim or storage of xpk that holds the run.
        values: What else the templates name: `name` of the job, `machines` with one process on
            each host, `command` word by word, `tokens` (variables with the secrets of the model
            and the data), container `image` and `cluster` of xpk.
    """
    folder = PurePosixPath(run).parent
    templates = templates_of(
        "gemma2_grpo.launch",
        sh=shlex.quote,
        words=shlex.join,
        lines=_lines,
        scalar=_scalar,
        block=_block,
        secret=lambda token: token.lower().replace("_", "-"),
    )
    return templates.get_template(_TEMPLATES[launcher]).render(
        _SAME_FOR_ALL | values,
        mounted=f"{folder}:{folder}" if folder.is_absolute() else "",
        notes=[" ".join(note.split()) for note in notes],  # A path may have line breaks.
        storage=storage,
        bucket=split_bucket(storage)[0] if "://" in storage else "",
    )


def split_bucket(storage: str) -> tuple[str, str]:
    """Splits `gs://bucket/some/folder` into `gs://bucket` and `some/folder`."""
    scheme, _, path = storage.partition("://")
    bucket, _, folder = path.partition("/")
    return f"{scheme}://{bucket}", folder.strip("/")


def _lines(command: Sequence[str]) -> str:
    """A shell command with each option on a line."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def _scalar(text: str) -> str:
    """A string in YAML: plain where it can be nothing else, otherwise in quotes."""
    if _PLAIN.fullmatch(text) and not _NOT_TEXT.fullmatch(text):
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    characters = (c if c.isprintable() else f"\\U{ord(c):08x}" for c in text.replace("\\", "\\\\"))
    return '"' + "".join(characters).replace('"', '\\"') + '"'


def _block(text: str) -> str:
    """Lines of a script in YAML, as a literal block where its characters allow that."""
    text = text.strip("\n") + "\n"
    if not all(c.isprintable() or c == "\n" for c in text):
        return _scalar(text)
    return "|\n" + "".join(f"  {line}" for line in text.splitlines(keepends=True))
