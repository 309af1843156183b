"""A training job as xpk, JobSet, Slurm and SkyPilot want it.

Sources: `parser/workload.py` and `core/docker_container.py` of AI-Hypercomputer/xpk; the resource
definition v1alpha2 of kubernetes-sigs/jobset and GKE's guides to TPUs and Cloud Storage FUSE; the
manual of sbatch and srun and NVIDIA pyxis; SkyPilot's YAML specification.
"""

import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from gemma2_grpo.launch.machines import Machines

MOUNT = "/runs"
"""Where the storage lies on every host."""
_GRACE_SECONDS = 120  # From SIGTERM to SIGKILL: for the rest of a step and a checkpoint.
_MAX_RESTARTS = 10
_USER_ERROR = 2  # Exit status of what a restart would not mend.
_CHECKPOINTED = 143  # Exit status after SIGTERM; the same command goes on from the checkpoint.
_COORDINATOR_PORT = 8476
_CONTINUED = " \\\n    "  # A line of a shell command, and the next.


@dataclass(frozen=True)
class Job:
    """One training run on given machines."""

    name: str
    machines: Machines
    command: tuple[str, ...]
    """What every host runs, word by word."""
    run: str
    """The run directory."""
    notes: tuple[str, ...]
    """What the reader of the recipe should know."""
    tokens: tuple[str, ...] = ()
    """Environment variables that hold the secrets of the model and the data."""
    image: str = ""
    storage: str = ""
    cluster: str = ""


def xpk(job: Job) -> str:
    """A shell script that hands the job to xpk, which makes a JobSet of it."""
    assert job.machines.tpu is not None
    # Without `exec`, SIGTERM would end the shell that xpk puts around the command, not the run.
    command = "exec " + shlex.join(job.command)
    arguments = [
        "xpk workload create",
        f"--cluster={shlex.quote(job.cluster)}",
        f"--workload={job.name}",
        f"--tpu-type={job.machines.tpu.cloud_name}",
        "--num-slices=1",
        f"--docker-image={shlex.quote(job.image)}",
        f"--storage={shlex.quote(job.storage)}",
        f"--max-restarts={_MAX_RESTARTS}",
        f"--termination-grace-period-seconds={_GRACE_SECONDS}",
        "--env=JAX_PLATFORMS=tpu,cpu",
        *(f'--env="{token}=${token}"' for token in job.tokens),
        f"--command={shlex.quote(command)}",
    ]
    notes = [
        *job.notes,
        f"Its storage has to be attached with --mount-point={MOUNT}.",
        *(f"xpk writes {token} into the workload in plain text." for token in job.tokens),
        "Submit: bash FILE, with xpk installed and gcloud's project and zone set.",
    ]
    return _script(notes, ["set -euo pipefail", *_demands(job), _CONTINUED.join(arguments)])


def jobset(job: Job) -> str:
    """A Kubernetes JobSet for TPU nodes of GKE."""
    metadata: dict[str, Any] = {"name": job.name}
    spec: dict[str, Any] = {}
    if job.machines.hosts > 1:
        # All hosts in one slice, and names by which they find each other.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
        spec["network"] = {"enableDNSHostnames": True, "subdomain": job.name}
    no_restart = {
        "name": "userError",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    spec["failurePolicy"] = {"maxRestarts": _MAX_RESTARTS, "rules": [no_restart]}
    workers = {"name": "train", "replicas": 1, "template": {"spec": _workers(job)}}
    spec["replicatedJobs"] = [workers]
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": spec,
    }
    notes = [
        *job.notes,
        *(
            f"First: kubectl create secret generic {_secret_name(token)} "
            f'--from-literal={token}="${token}"'
            for token in job.tokens
        ),
        "Submit: kubectl apply -f FILE, on a cluster with the JobSet controller.",
    ]
    return _comments(notes) + _to_yaml(manifest)


def slurm(job: Job) -> str:
    """A batch script with one task a node, which holds all its GPUs."""
    chips = job.machines.chips_per_host
    directives = [
        f"--job-name={job.name}",
        f"--nodes={job.machines.hosts}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={chips}",
        "--exclusive",
        "--mem=0",
        f"--signal=TERM@{_GRACE_SECONDS}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
    ]
    srun = [
        "srun --cpu-bind=none --kill-on-bad-exit=0 --wait=0",
        *_container_options(job),
        f"{_lines(job.command)} || status=$?",
    ]
    body = [
        *(f"#SBATCH {each}" for each in directives),
        "",
        *_demands(job),
        "export JAX_PLATFORMS=cuda,cpu",
        "# Left to itself, JAX gives a task of Slurm one GPU, that of its number on the node.",
        f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(chips)))}",
        "status=0",
        "# Tasks that are done must not end the one that still writes the checkpoint.",
        _CONTINUED.join(srun),
        f"# {_CHECKPOINTED} is SIGTERM and a checkpoint: the same command goes on from there.",
        f'if [ "$status" -eq {_CHECKPOINTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$status"',
    ]
    program = [] if job.image else ["gemma2-grpo has to be on the PATH, on every node."]
    notes = [
        *job.notes,
        *program,
        "Submit: sbatch --partition=... --time=... FILE, in a folder that all nodes share.",
    ]
    return _script(notes, body)


def skypilot(job: Job) -> str:
    """A SkyPilot task: Cloud TPU machines, or GPUs of any cloud."""
    machines = job.machines
    tpu = machines.tpu
    task: dict[str, Any] = {"name": job.name}
    if tpu:
        task["resources"] = {"infra": "gcp", "accelerators": f"tpu-{tpu.cloud_name}"}
    else:
        task["resources"] = {"accelerators": machines.accelerator}
        task["num_nodes"] = machines.hosts
    task["workdir"] = "."
    bucket, _ = split_bucket(job.storage)
    task["file_mounts"] = {MOUNT: {"source": bucket, "mode": "MOUNT_CACHED"}}
    task["envs"] = {"JAX_PLATFORMS": "tpu,cpu" if tpu else "cuda,cpu"}
    if job.tokens:
        task["secrets"] = dict.fromkeys(job.tokens)
    extra = "tpu" if tpu else "cuda"
    task["setup"] = (
        "uv venv --allow-existing --python 3.12 .venv\nsource .venv/bin/activate\n"
        f"uv pip install -c requirements.txt -e '.[{extra}]'\n"
    )
    command = _CONTINUED.join([_lines(job.command), *_rank(machines)])
    task["run"] = f"source .venv/bin/activate\n{command}\n"
    secrets = "".join(f" --secret {token}" for token in job.tokens)
    notes = [
        *job.notes,
        f"Submit: sky jobs launch{secrets} FILE, in a checkout of this project.",
    ]
    return _comments(notes) + _to_yaml(task)


def split_bucket(storage: str) -> tuple[str, str]:
    """Splits `gs://bucket/some/folder` into `gs://bucket` and `some/folder`."""
    scheme, _, path = storage.partition("://")
    bucket, _, folder = path.partition("/")
    return f"{scheme}://{bucket}", folder.strip("/")


def _workers(job: Job) -> dict[str, Any]:
    """The Kubernetes job with a pod on each host. One that fails ends it; JobSet begins again."""
    user_error = {"containerName": "train", "operator": "In", "values": [_USER_ERROR]}
    return {
        "parallelism": job.machines.hosts,
        "completions": job.machines.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": user_error}]},
        "template": _pod(job),
    }


def _pod(job: Job) -> dict[str, Any]:
    """The pod of one host."""
    tpu = job.machines.tpu
    assert tpu is not None
    is_bucket = "://" in job.storage
    environment: list[dict[str, Any]] = [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}]
    for token in job.tokens:
        reference = {"name": _secret_name(token), "key": token}
        environment.append({"name": token, "valueFrom": {"secretKeyRef": reference}})
    container = {
        "name": "train",
        "image": job.image,
        # Kubernetes reads `$(NAME)` as a variable and `$$` as a dollar.
        "command": [word.replace("$", "$$") for word in job.command],
        "env": environment,
        # Ports of the TPU runtime: between hosts, and metrics.
        "ports": [{"containerPort": 8471}, {"containerPort": 8431}],
        "resources": {"limits": {"google.com/tpu": job.machines.chips_per_host}},
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}],
    }
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.family.gke_accelerator,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
        },
        "containers": [container],
        "volumes": [{"name": "runs", **_volume(job.storage)}],
    }
    annotations = {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}}
    return {**(annotations if is_bucket else {}), "spec": spec}


def _volume(storage: str) -> dict[str, Any]:
    """A bucket by Cloud Storage FUSE, or a claim on a volume of the cluster."""
    if "://" not in storage:
        return {"persistentVolumeClaim": {"claimName": storage}}
    bucket = split_bucket(storage)[0].removeprefix("gs://")
    # A checkpoint is a directory that is renamed when it is whole.
    options = "implicit-dirs,rename-dir-limit=100"
    attributes = {"bucketName": bucket, "mountOptions": options}
    return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}


def _container_options(job: Job) -> list[str]:
    """Options by which srun, with pyxis, runs an image that sees the run directory."""
    if not job.image:
        return []
    mounts = '"$PWD:$PWD"'
    if PurePosixPath(job.run).is_absolute():
        folder = PurePosixPath(job.run).parent
        mounts += "," + shlex.quote(f"{folder}:{folder}")
    return [
        f"--container-image={shlex.quote(job.image)}",
        f'--container-mounts={mounts} --container-workdir="$PWD"',
    ]


def _rank(machines: Machines) -> list[str]:
    """Options by which the processes of SkyPilot's hosts find each other."""
    if machines.hosts == 1:
        return []
    if machines.tpu:  # The metadata server of a pod tells JAX.
        return ["--coordinator auto"]
    return [
        f'--coordinator "$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{_COORDINATOR_PORT}"',
        '--num-processes "$SKYPILOT_NUM_NODES"',
        '--process-id "$SKYPILOT_NODE_RANK"',
    ]


def _secret_name(token: str) -> str:
    return token.lower().replace("_", "-")


def _demands(job: Job) -> list[str]:
    """Lines that stop a script when a token is not in the environment."""
    return [f': "${{{token}:?export it first}}"' for token in job.tokens]


def _lines(command: tuple[str, ...]) -> str:
    """A shell command with each option on a line."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return _CONTINUED.join(shlex.join(line) for line in lines)


def _script(notes: list[str], body: list[str]) -> str:
    return "#!/bin/bash\n" + _comments(notes) + "\n".join(body) + "\n"


def _comments(notes: list[str]) -> str:
    return "".join(f"# {' '.join(note.split())}\n" for note in notes)  # A path may have new lines.


class _Dumper(yaml.SafeDumper):
    """Writes scripts as blocks, as a person would."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _to_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)
