"""Recipes for clusters: every field by value, and the command in them as `train` reads it."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma2_grpo import cli
from gemma2_grpo.commands.train import Train
from gemma2_grpo.config import Config
from gemma2_grpo.errors import UserError
from gemma2_grpo.launch.launch import train_command
from gemma2_grpo.launch.machines import find_machines
from gemma2_grpo.presets import load_config
from gemma2_grpo.runtime.chips import TPU_FAMILIES

FLAGSHIP = load_config("gemma2-2b-v5e8")
XPK = "launch xpk --image r/i:1 --storage s --cluster c"
JOBSET = "launch jobset --image r/i:1 --storage gs://b"
SLURM = "launch slurm --accelerator H100:8"
SKYPILOT = "launch skypilot --storage gs://b"

# The options of several processes, and how the test's machines set what SkyPilot would.
RANK = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture[str]) -> Any:
    """Prints the recipe of a command line."""

    def run(command: str | list[str]) -> str:
        words = command if isinstance(command, list) else command.split()
        assert cli.main(words) == 0
        return capsys.readouterr().out

    return run


def _with_mesh(config: Config, *shape: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mesh_shape=shape))


def _train(words: list[str]) -> Train:
    """What `gemma2-grpo train ...` would do."""
    assert words[0] == "gemma2-grpo"
    parsed = cli.parse(words[1:])
    assert isinstance(parsed, Train)
    return parsed


def _run_bash(script: str, folder: Path, environment: dict[str, str] | None = None) -> list[str]:
    """Runs a script among programs that only record their words; returns those of the first one.

    `srun` ends as after SIGTERM with a checkpoint; what `scontrol` is told is kept apart.
    """
    record = folder / "words"
    programs = {
        "xpk": f'printf "%s\\0" xpk "$@" >{record}',
        "srun": f'printf "%s\\0" srun "$@" >{record}; exit 143',
        "gemma2-grpo": f'printf "%s\\0" gemma2-grpo "$@" >{record}',
        "scontrol": f'echo "$@" >{folder}/requeued',
        "uv": "",
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{line}\n")
        (folder / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv" / "bin" / "activate").touch()
    variables = {"PATH": f"{folder}:/usr/bin:/bin", "HF_TOKEN": "a b$c", **(environment or {})}
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    done = subprocess.run(["bash"], input=script, text=True, cwd=folder, env=variables)
    assert done.returncode == (143 if "srun" in script else 0)
    return record.read_text().split("\0")[:-1]


@pytest.mark.parametrize(
    ("accelerator", "launcher", "hosts", "chips", "topology"),
    [
        ("v5e-1", "jobset", 1, 1, "1x1"),
        ("v5e-4", "skypilot", 1, 4, "2x2"),
        ("v5e-8", "jobset", 1, 8, "2x4"),
        ("v5e-8", "skypilot", 1, 8, "2x4"),
        ("v5e-8", "xpk", 2, 4, "2x4"),
        ("v5litepod-16", "xpk", 4, 4, "4x4"),
        ("v5e-32", "jobset", 8, 4, "4x8"),
        ("v5e-256", "skypilot", 64, 4, "16x16"),
        ("v6e-4", "xpk", 1, 4, "2x2"),
        ("v6e-8", "skypilot", 1, 8, "2x4"),
        ("v6e-64", "xpk", 16, 4, "8x8"),
        ("v5p-8", "jobset", 1, 4, "2x2x1"),
        ("v5p-16", "xpk", 2, 4, "2x2x2"),
        ("v4-32", "skypilot", 4, 4, "2x2x4"),
    ],
)
def test_slices_are_laid_out_as_their_launcher_has_them(
    accelerator: str, launcher: Any, hosts: int, chips: int, topology: str
) -> None:
    machines = find_machines(accelerator, None, launcher)
    assert machines.tpu is not None
    assert (machines.hosts, machines.chips_per_host) == (hosts, chips)
    assert machines.tpu.topology == topology


def test_names_of_slices_count_cores() -> None:
    assert list(TPU_FAMILIES["v5e"].slices()) == [1, 4, 8, 16, 32, 64, 128, 256]
    assert TPU_FAMILIES["v5p"].slices()[128] == "4x4x4"


def test_a_node_pool_may_divide_eight_chips() -> None:
    assert find_machines("v5e-8", 2, "jobset").chips_per_host == 4
    assert find_machines("h100:4", 3, "slurm") == find_machines("h100:4", 3, "skypilot")


def test_xpk(recipe: Any, tmp_path: Path) -> None:
    script = recipe(f"{XPK} --accelerator v5e-16 --max-steps 20")
    words = _run_bash(script, tmp_path)
    assert words[:3] == ["xpk", "workload", "create"]
    options: dict[str, list[str]] = {}
    for word in words[3:]:
        name, value = word.split("=", 1)
        options.setdefault(name, []).append(value)
    command = options.pop("--command")[0]
    assert options == {
        "--cluster": ["c"],
        "--workload": ["gemma2-2b-v5e8"],
        "--tpu-type": ["v5litepod-16"],
        "--num-slices": ["1"],
        "--docker-image": ["r/i:1"],
        "--storage": ["s"],
        "--max-restarts": ["10"],
        "--termination-grace-period-seconds": ["120"],
        "--env": ["JAX_PLATFORMS=tpu,cpu", "HF_TOKEN=a b$c"],
    }
    # As xpk runs it: in a subshell in the background.
    parsed = _train(_run_bash(f"({command}) & wait $!", tmp_path))
    steps = dataclasses.replace(FLAGSHIP.run, max_steps=20)
    assert parsed.config == dataclasses.replace(_with_mesh(FLAGSHIP, 1, 4), run=steps)
    assert parsed.run == Path("/runs/gemma2-2b-v5e8")


def test_scripts_stop_without_a_token(recipe: Any, tmp_path: Path) -> None:
    for script in (recipe(XPK), recipe(SLURM)):
        done = subprocess.run(["bash"], input=script, text=True, cwd=tmp_path, env={"PATH": "/bin"})
        assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_jobset_of_several_hosts(recipe: Any) -> None:
    manifest = yaml.safe_load(recipe(f"{JOBSET}/team/a --accelerator v5e-16"))
    _check_jobset(manifest)
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert manifest["spec"]["network"] == {
        "enableDNSHostnames": True,
        "subdomain": "gemma2-2b-v5e8",
    }
    [workers] = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["parallelism"], job["completions"], workers["replicas"]) == (4, 4, 1)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    [container] = pod["containers"]
    assert container["image"] == "r/i:1"
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["env"] == [
        {"name": "JAX_PLATFORMS", "value": "tpu,cpu"},
        {
            "name": "HF_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN"}},
        },
    ]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b"
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    parsed = _train(container["command"])
    assert parsed.config == _with_mesh(FLAGSHIP, 1, 4)
    assert parsed.run == Path("/runs/team/a/gemma2-2b-v5e8")


def test_jobset_of_one_host_and_a_claim(recipe: Any) -> None:
    command = "launch jobset tiny --image i --storage my-claim --run /runs/x --name n"
    manifest = yaml.safe_load(recipe(command.split()))
    _check_jobset(manifest)
    assert manifest["metadata"] == {"name": "n"}
    assert "network" not in manifest["spec"]
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == 1
    assert "metadata" not in job["template"]
    pod = job["template"]["spec"]
    claim = {"persistentVolumeClaim": {"claimName": "my-claim"}}
    assert pod["volumes"] == [{"name": "runs", **claim}]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 8}
    assert [each["name"] for each in container["env"]] == ["JAX_PLATFORMS"]
    assert _train(container["command"]).config == _with_mesh(load_config("tiny"), 2, 4)


def _check_jobset(manifest: dict[str, Any]) -> None:
    """What the controllers of JobSet and of Kubernetes jobs demand."""
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    spec = manifest["spec"]
    assert set(spec) <= {"network", "failurePolicy", "replicatedJobs"}
    [rule] = spec["failurePolicy"]["rules"]
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    [workers] = spec["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a pod failure policy demands it"
    [container] = pod["containers"]
    [policy] = job["podFailurePolicy"]["rules"]
    assert policy["action"] == "FailJob"
    assert policy["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    labels = [manifest["metadata"]["name"], *mounted, container["name"], workers["name"]]
    assert all(re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", label) for label in labels)
    assert all(isinstance(word, str) for word in container["command"])


def test_slurm(recipe: Any, tmp_path: Path) -> None:
    script = recipe(f"{SLURM} --hosts 2")
    head, _, body = script.partition("\n\n")
    assert re.findall(r"^#SBATCH (.*)$", head, re.MULTILINE) == [
        "--job-name=gemma2-2b-v5e8",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--exclusive",
        "--mem=0",
        "--signal=TERM@120",
        "--requeue",
        "--open-mode=append",
        "--output=gemma2-2b-v5e8-%j.log",
    ]
    assert "#SBATCH" not in body, "sbatch reads none after the first command"
    words = _run_bash(script, tmp_path, {"SLURM_JOB_ID": "17"})
    begin = words.index("gemma2-grpo")
    assert words[:begin] == ["srun", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=0"]
    parsed = _train(words[begin:])
    assert (parsed.config, parsed.run) == (FLAGSHIP, Path("runs/gemma2-2b-v5e8"))
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in script


def test_slurm_in_a_container(recipe: Any, tmp_path: Path) -> None:
    run = "/scratch/it's $HOME/r"
    words = _run_bash(recipe([*SLURM.split(), "--image", "h#r/i", "--run", run]), tmp_path)
    folder = "/scratch/it's $HOME"
    begin = words.index("gemma2-grpo")
    assert words[4:begin] == [
        "--container-image=h#r/i",
        f"--container-mounts={tmp_path}:{tmp_path},{folder}:{folder}",
        f"--container-workdir={tmp_path}",
    ]
    assert _train(words[begin:]).run == Path(run)


def test_skypilot_on_a_tpu(recipe: Any, tmp_path: Path) -> None:
    task = yaml.safe_load(recipe(SKYPILOT))
    setup, run = task.pop("setup"), task.pop("run")
    assert task == {
        "name": "gemma2-2b-v5e8",
        "resources": {"infra": "gcp", "accelerators": "tpu-v5litepod-8"},
        "workdir": ".",
        "file_mounts": {"/runs": {"source": "gs://b", "mode": "MOUNT_CACHED"}},
        "envs": {"JAX_PLATFORMS": "tpu,cpu"},
        "secrets": {"HF_TOKEN": None},
    }
    words = _run_bash(setup + run, tmp_path)
    assert "'.[tpu]'" in setup
    parsed = _train(words)
    assert (parsed.config, parsed.run) == (FLAGSHIP, Path("/runs/gemma2-2b-v5e8"))


def test_skypilot_tells_each_process_which_it_is(recipe: Any, tmp_path: Path) -> None:
    gpus = yaml.safe_load(recipe(f"{SKYPILOT} --accelerator A100-80GB:4 --hosts 2"))
    assert gpus["resources"] == {"accelerators": "A100-80GB:4"}
    assert gpus["num_nodes"] == 2
    words = _run_bash(gpus["run"], tmp_path, {**RANK, "SKYPILOT_NODE_RANK": "1"})
    parsed: Any = _train(words)
    assert parsed.config == _with_mesh(FLAGSHIP, 1, 4)
    rank = (parsed.coordinator, parsed.num_processes, parsed.process_id)
    assert rank == ("10.0.0.1:8476", 2, 1)
    pod = yaml.safe_load(recipe(f"{SKYPILOT} --accelerator v6e-16"))
    assert "num_nodes" not in pod, "a pod is one node of SkyPilot"
    assert _train(_run_bash(pod["run"], tmp_path)).coordinator == "auto"


ODD = """/runs/it's "a" $HOME $(date) `x` $$ \\ é; ls"""


def test_odd_paths_arrive_as_they_are(recipe: Any, tmp_path: Path) -> None:
    def words(tool: str) -> list[str]:
        return [*tool.split(), "--run", ODD]

    xpk = _run_bash(recipe(words(XPK)), tmp_path)[-1].removeprefix("--command=")
    assert _train(_run_bash(xpk, tmp_path)).run == Path(ODD)
    slurm = _run_bash(recipe(words(SLURM)), tmp_path)
    assert _train(slurm[slurm.index("gemma2-grpo") :]).run == Path(ODD)
    sky = yaml.safe_load(recipe(words(SKYPILOT)))["run"]
    assert _train(_run_bash(sky, tmp_path)).run == Path(ODD)
    manifest = yaml.safe_load(recipe(words(JOBSET)))
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # Kubernetes makes one dollar of two, and a variable of `$(NAME)`.
    command = [word.replace("$$", "$") for word in pod["containers"][0]["command"]]
    assert all(word.count("$") % 2 == 0 for word in pod["containers"][0]["command"])
    assert _train(command).run == Path(ODD)


def test_only_what_differs_from_the_preset_is_passed_on() -> None:
    command = train_command(FLAGSHIP, "gemma2-2b-v5e8", "r")
    assert command == ("gemma2-grpo", "train", "gemma2-2b-v5e8", "--run", "r")


def test_a_file_becomes_the_nearest_preset_and_options(recipe: Any, tmp_path: Path) -> None:
    file = tmp_path / "My Run.toml"
    preset = Path(cli.__file__).parent / "configs" / "gemma2-2b-gsm8k-strong.toml"
    file.write_text(
        preset.read_text()
        .replace("epsilon_high = 0.28", "epsilon_high = 0.3")
        .replace("[run]", "[run]\ntensorboard = false\nseed = 7")
    )
    task = yaml.safe_load(recipe([*SKYPILOT.split(), str(file)]))
    words = _run_bash(task["run"], tmp_path)
    assert words[:3] == ["gemma2-grpo", "train", "gemma2-2b-gsm8k-strong"]
    assert task["name"] == "my-run"
    parsed = _train(words)
    assert parsed.config == load_config(str(file))
    assert parsed.run == Path("/runs/My Run")
    assert words[3:] == (
        ["--run", "/runs/My Run", "--epsilon-high", "0.3", "--seed", "7", "--no-tensorboard"]
    )


def test_absent_values_and_lists_are_passed_on(recipe: Any, tmp_path: Path) -> None:
    command = f"{SKYPILOT} gemma2-2b-gsm8k-strong --epsilon-high None --lora-modules a|b c"
    task = yaml.safe_load(recipe(f"{command} --shuffle-rewards --learning-rate 1e-7"))
    config = _train(_run_bash(task["run"], tmp_path)).config
    assert config.grpo.epsilon_high is None
    assert config.model.lora_modules == ("a|b", "c")
    assert config.rewards.shuffle_rewards
    assert config.optimizer.learning_rate == 1e-7


def test_a_chosen_mesh_stays(recipe: Any, tmp_path: Path) -> None:
    task = yaml.safe_load(recipe(f"{SKYPILOT} --mesh-shape 4 2"))
    assert _train(_run_bash(task["run"], tmp_path)).config.model.mesh_shape == (4, 2)


def test_tokens_follow_the_model_and_the_data(recipe: Any) -> None:
    def secrets(options: str) -> Any:
        return yaml.safe_load(recipe(f"{SKYPILOT} {options}")).get("secrets")

    kaggle = "kaggle:google/gemma-2/transformers/gemma-2-2b-it"
    assert secrets(f"--model {kaggle}") == {"KAGGLE_API_TOKEN": None}
    assert secrets("--dataset kaggle:a/b") == {"HF_TOKEN": None, "KAGGLE_API_TOKEN": None}
    assert secrets("--model /models/gemma") is None


def test_a_file_that_must_be_in_the_image_is_named(recipe: Any, tmp_path: Path) -> None:
    reward = tmp_path / "re\nward.py"
    reward.touch()
    text = recipe([*JOBSET.split(), "--reward", f"{reward}:score"])
    assert f"# It reads {tmp_path}/re ward.py, which must be in the image.\n" in text


@pytest.mark.parametrize("tool", [XPK, JOBSET, SLURM, SKYPILOT])
def test_recipes_say_what_was_run(recipe: Any, tool: str) -> None:
    assert "# Tests check its syntax and its options. It has not been run on a cluster.\n" in (
        recipe(tool)
    )


def test_it_is_quick_and_loads_nothing_heavy() -> None:
    code = f"""
import sys, time
from gemma2_grpo.cli import main
assert main({JOBSET.split()}) == 0
heavy = ("flax", "jax", "numpy", "pyarrow", "rich", "tunix")
print(time.process_time(), *(m for m in heavy if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *imported = done.stdout.splitlines()[-1].split()
    assert imported == []
    assert float(seconds) < 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("launch", "TOOL is missing; see gemma2-grpo launch --help"),
        (
            "launch pbs",
            "TOOL takes one of xpk, jobset, slurm, skypilot, not 'pbs'",
        ),
        (
            "launch xpk",
            "xpk needs --image: the container image with gemma2-grpo in it; docs/scaling.md "
            "shows how to build one",
        ),
        (
            "launch xpk --image i",
            "xpk needs --storage: the name of a storage that is attached to the cluster",
        ),
        (
            "launch xpk --image i --storage s",
            "xpk needs --cluster: the name of the GKE cluster",
        ),
        (
            "launch jobset --image i",
            "jobset needs --storage: gs://BUCKET, or the name of a volume claim",
        ),
        (
            "launch skypilot",
            "skypilot needs --storage: gs://BUCKET, or that of another cloud",
        ),
        (
            f"{SLURM} --storage gs://b",
            "slurm takes no --storage: its nodes share a file system; give --run a path on that",
        ),
        (
            f"{SKYPILOT} --image i",
            "skypilot takes no --image: it installs the checkout that it is started in",
        ),
        (f"{JOBSET} --cluster c", "jobset takes no --cluster: leave it out"),
        (
            "launch jobset --image i --storage s3://b",
            "storage 's3://b': jobset takes gs://BUCKET, or the name of a volume claim",
        ),
        (
            "launch skypilot --storage claim",
            "storage 'claim': skypilot takes gs://BUCKET, or that of another cloud",
        ),
        (
            f"{XPK} --accelerator v5e-4",
            "accelerator 'v5e-4': the smallest v5e of xpk is v5e-8",
        ),
        (
            "launch slurm",
            "accelerator 'v5e-8': slurm is written for GPUs; pass those of one host, such as "
            "--accelerator H100:8",
        ),
        (
            f"{JOBSET} --accelerator H100:8",
            "accelerator 'H100:8': jobset is written for TPU slices; use slurm or skypilot for "
            "GPUs, or pass --accelerator v5e-8",
        ),
        (
            f"{JOBSET} --accelerator v5e-16 --hosts 2",
            "hosts = 2: v5e-16 has 4 on jobset; change --hosts",
        ),
        (
            f"{JOBSET} --hosts 4",
            "hosts = 4: v5e-8 has 1 or 2 on jobset; change --hosts",
        ),
        (f"{SLURM} --hosts 0", "hosts = 0 must be at least 1"),
        (
            f"{SLURM} --hosts 3",
            "prompts_per_step = 8 does not divide over 3 hosts; make it a multiple of 3, or take "
            "fewer hosts",
        ),
        (
            f"{JOBSET} --mesh-shape 1 8",
            "mesh_shape = (1, 8): tp = 8 does not divide the 4 KV heads of google/gemma-2-2b-it; "
            "give tp (the second) as 1, 2 or 4",
        ),
        (
            f"{JOBSET} --accelerator v5e-16 --mesh-shape 4 4",
            "mesh_shape = (4, 4) is 16 chips, but a host of v5e-16 has 4; the mesh is that of one "
            "host, so change --mesh-shape or leave it out",
        ),
        (
            f"{JOBSET} --mesh-shape 8 1 --micro-batch-tokens 6000",
            "micro_batch_tokens = 6000 does not hold a sequence of 768 tokens for each of "
            "mesh_shape[0] = 8; raise it to 6144",
        ),
        (
            f"{JOBSET} --run /data/r",
            "run '/data/r' is lost with its host; the storage is mounted at /runs, so give a path "
            "below that, or leave --run out",
        ),
        (
            f"{JOBSET} --name My_Job",
            "name 'My_Job' is not a name for a job; give --name of at most 40 small letters, "
            "digits and hyphens that begins with a letter",
        ),
    ],
)
def test_a_mistake_is_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command.split()) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("accelerator", ["v5e-12", "v7x-8", "v5p-4", "H100", "H100:0", "v5e", ""])
def test_an_unknown_accelerator_names_the_known(accelerator: str) -> None:
    with pytest.raises(UserError) as error:
        find_machines(accelerator, None, "jobset")
    assert f"accelerator {accelerator!r} is not known" in str(error.value)
    assert "v5e-1, v5e-4, v5e-8, v5e-16" in str(error.value)
    assert "v4-128" in str(error.value)
    assert "H100:8" in str(error.value)
