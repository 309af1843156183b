"""Whether this process is one of several, by the command line or the environment."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma2_grpo.errors import UserError

ASK = "auto"
"""Coordinator of whoever wants the cluster to be asked."""
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_OPTIONS = ("--coordinator", "--num-processes", "--process-id")
# What JAX needs to find of Slurm and of Open MPI, that is, steps of srun and ranks of mpirun.
_SLURM = "SLURM_JOB_ID SLURM_STEP_NODELIST SLURM_NTASKS SLURM_PROCID SLURM_LOCALID".split()
_OPEN_MPI = "OMPI_MCA_orte_hnp_uri OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK".split()
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


@dataclass(frozen=True)
class Cluster:
    """Several processes, and which of them this one is; None is for the cluster to say."""

    coordinator: str | None = None
    """Host and port of process 0."""
    num_processes: int | None = None
    process_id: int | None = None
    """From 0."""


def find_cluster(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> Cluster | None:
    """The processes that this one is to join; None if it runs alone.

    Nothing is contacted: a cluster counts only where the environment says that there are several
    processes, or where it is asked for with the coordinator `auto`.

    Args:
        coordinator: Option; by default JAX_COORDINATOR_ADDRESS.
        num_processes: Option; by default JAX_NUM_PROCESSES. 1 is alone, whatever the rest says.
        process_id: Option; by default JAX_PROCESS_ID.
        environment: Environment variables.

    Raises:
        UserError: for options that are incomplete, or contradict each other.
    """
    address, count, number = _VARIABLES
    coordinator = coordinator or environment.get(address) or None
    num_processes = _number(environment, count) if num_processes is None else num_processes
    process_id = _number(environment, number) if process_id is None else process_id
    values = (coordinator, num_processes, process_id)
    if num_processes == 1 and process_id in (None, 0):
        return None
    is_evident = _is_evident(environment)
    if coordinator == ASK:
        if (num_processes, process_id) != (None, None):
            raise UserError("--coordinator auto finds the processes itself; leave out the others")
        return Cluster()
    if values == (None, None, None):
        return Cluster() if is_evident else None
    missing = [name for name, value in zip(_OPTIONS, values, strict=True) if value is None]
    if missing and not is_evident:
        raise UserError(
            f"{' and '.join(missing)} is missing: each of several processes needs "
            f"{', '.join(_OPTIONS)}; --num-processes 1 runs alone"
        )
    _check(*values)
    return Cluster(*values)


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator takes HOST:PORT or auto, not {coordinator!r}")
    if num_processes is not None and num_processes < 1:
        raise UserError(f"--num-processes = {num_processes} must be at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        last = "" if num_processes is None else f" to {num_processes - 1}"
        raise UserError(f"--process-id = {process_id} is none of the processes from 0{last}")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"{name} = {text!r} is not a whole number; correct or unset it")
    return int(text)


def _is_evident(environment: Mapping[str, str]) -> bool:
    """Whether the environment itself says that there are several processes.

    Source: jax/_src/clusters, which finds their addresses. What only a server of the cloud knows,
    as of TPU pods without Kubernetes, is left to `auto`.
    """

    def several(names: Sequence[str], count: str) -> bool:
        present = all(name in environment for name in names)
        return present and environment[count].isdecimal() and int(environment[count]) > 1

    hosts = next((environment[name] for name in _TPU_HOSTS if environment.get(name)), "")
    slices = environment.get("MEGASCALE_NUM_SLICES", "")
    return (
        several(_SLURM, "SLURM_NTASKS")
        or several(_OPEN_MPI, "OMPI_COMM_WORLD_SIZE")
        or len(hosts.split(",")) > 1
        or (slices.isdecimal() and int(slices) > 1)
    )
