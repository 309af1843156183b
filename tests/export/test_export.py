"""Exports load elsewhere and say what the run says; what cannot be written leaves nothing."""

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tomli_w
from flax import nnx
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tests.fixtures.runs import EMBEDDED
from tests.fixtures.written_run import greedy, measured, write, write_lines
from tokenizers import Tokenizer

from gemma2_grpo.commands.export import Export
from gemma2_grpo.errors import UserError
from gemma2_grpo.export import hub, verify
from gemma2_grpo.export.model_card import Exported, render_card
from gemma2_grpo.export.verify import compare_with_transformers
from gemma2_grpo.model import chat_template
from gemma2_grpo.model.adapter import fingerprint, save_adapter
from gemma2_grpo.model.architecture import read_architecture
from gemma2_grpo.model.hub.find import hub_id
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.lora import adapters_of, add_lora
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.presets import load_config
from gemma2_grpo.run.console import Display
from gemma2_grpo.run.results import Evaluation, HeldOutData, RunResult, System
from gemma2_grpo.run.schema import Data, RunFacts
from gemma2_grpo.run.source import Opened, find_source, open_source
from gemma2_grpo.runtime import atomic
from gemma2_grpo.runtime.checkpoint import save_checkpoint
from gemma2_grpo.task.procedural import generate
from gemma2_grpo.task.prompts import render_prompt

ARCHITECTURE = read_architecture(EMBEDDED)
DOCS = Path(__file__).parents[2] / "docs" / "export.md"
MODEL_FILES = [
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
QUESTIONS = [problem.question for problem in generate("test", 8, 1)]


def quiet_export(run: Path | str, to: Path, **options: Any) -> str:
    """Exports, and returns what was shown."""
    shown = io.StringIO()
    display = Display(Console(file=shown, width=200, highlight=False))
    options = {"verify": "never", **options}
    assert Export(str(run), to, **options)(display) == to
    return shown.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the embedded model, its adapters drawn instead of trained."""
    path = tmp_path_factory.mktemp("runs") / "drawn"
    config, mesh = load_config("tiny"), make_mesh((1, 1))
    policy = add_lora(load_weights(EMBEDDED, "float32", mesh), config.model, mesh, 0)
    random = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda x: (0.03 * random.standard_normal(x.shape)).astype(np.float32),
        nnx.state(policy, nnx.LoRAParam),
    )
    nnx.update(policy, drawn)
    save_adapter(policy, path / "adapter", config.model, fingerprint(EMBEDDED))
    sections = dataclasses.asdict(config)
    sections["optimizer"]["learning_rate"] = 0.5
    without_none = {
        name: {k: v for k, v in section.items() if v is not None}
        for name, section in sections.items()
    }
    (path / "config.toml").write_text(tomli_w.dumps(without_none))
    before, after = (measured(step, correct, 64) for step, correct in ((0, 16), (40, 48)))
    write_lines(path, [before, after])
    write(path, RunResult(before=before, after=after, rises=()))
    data = Data(source="procedural")
    write(path, RunFacts(schema_version=1, data=data, data_sha256="abc", starts=()))
    return path


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    return open_source(find_source(str(run)))


@pytest.fixture(scope="module")
def ours(opened: Opened) -> list[str]:
    """Our greedy answers."""
    prompts = [render_prompt(question) for question in QUESTIONS]
    sampler = opened.sampler(adapted=True)
    return sampler(prompts, 1, jax.random.key(0), greedy=True).texts


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("exports") / "merged"
    quiet_export(run, to, dtype="float32")
    return to


@pytest.fixture(scope="module")
def adapter(run: Path, merged: Path) -> Path:
    to = merged.parent / "adapter"
    quiet_export(run, to, format="peft")
    return to


# --- What is written ---


def test_a_whole_model_is_written_in_the_type_of_the_base(run: Path, tmp_path: Path) -> None:
    shown = quiet_export(run, tmp_path / "new" / "model")
    to = tmp_path / "new" / "model"
    assert sorted(path.name for path in to.iterdir()) == MODEL_FILES
    assert [path.name for path in to.parent.iterdir()] == ["model"]
    assert re.search(r"Rounding to bfloat16 moved the adapted weights by [\d.]+ % of", shown)
    assert f"{to}: merged, bfloat16, after 40 steps" in shown
    assert {str(x.dtype) for x in load_file(to / "model.safetensors").values()} == {"bfloat16"}
    config = json.loads((EMBEDDED / "config.json").read_text())
    assert json.loads((to / "config.json").read_text()) == config
    generation = json.loads((to / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (to / name).read_bytes() == (EMBEDDED / name).read_bytes()


def test_float32_is_told_to_whoever_loads_it(merged: Path) -> None:
    assert json.loads((merged / "config.json").read_text())["torch_dtype"] == "float32"
    assert {str(x.dtype) for x in load_file(merged / "model.safetensors").values()} == {"float32"}
    assert "Rounding" not in (merged / "README.md").read_text()


def test_our_own_loader_gives_the_policy_back(
    merged: Path, opened: Opened, ours: list[str]
) -> None:
    source = find_source(str(merged))
    model = dataclasses.replace(opened.config.model, model=str(merged))
    config = dataclasses.replace(opened.config, model=model)
    again = open_source(dataclasses.replace(source, config=config))
    prompts = [render_prompt(question) for question in QUESTIONS]
    sampler = again.sampler(adapted=False)
    assert sampler(prompts, 1, jax.random.key(0), greedy=True).texts == ours


def test_an_unfinished_run_gives_its_last_checkpoint(
    run: Path, opened: Opened, merged: Path, tmp_path: Path
) -> None:
    path, to = tmp_path / "unfinished", tmp_path / "to"
    shutil.copytree(run, path, ignore=shutil.ignore_patterns("adapter", "result.json"))
    assert opened.policy
    save_checkpoint(path / "checkpoints", 4, {"lora": adapters_of(opened.policy)}, 1)
    shown = quiet_export(path, to, dtype="float32", max_shard_gb=0.001)
    assert f"{to}: merged, float32, after 4 steps" in shown
    shards = sorted(to.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    whole = load_file(merged / "model.safetensors")
    parts = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert parts.keys() == whole.keys()
    for name, value in parts.items():
        np.testing.assert_array_equal(value, whole[name])
    # What was measured later is not said of these steps.
    card = (to / "README.md").read_text()
    assert "after 40 steps" not in card and "there is nothing yet to compare that with" in card


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def run_snippet(code: str) -> tuple[dict[str, Any], str]:
    """Runs the snippet of a card in float32; returns its names and what it prints."""
    said, names = io.StringIO(), {}
    with redirect_stdout(said):
        exec(code.replace('dtype="auto"', 'dtype="float32"'), names)
    return names, said.getvalue()


def answer(opened: Opened, question: str) -> str:
    """Our greedy answer."""
    sampler = opened.sampler(adapted=True)
    prompts = [render_prompt(question)]
    return sampler(prompts, 1, jax.random.key(0), greedy=True).texts[0]


def on_another_base(run: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """The run as if it had been trained on a changed copy of its base, whose weights are alike."""
    base, path = folder / "base", folder / "run"
    shutil.copytree(EMBEDDED, base)
    change(base)
    shutil.copytree(run, path)
    config = (path / "config.toml").read_text()
    assert 'model = "embedded"' in config
    (path / "config.toml").write_text(config.replace('"embedded"', json.dumps(str(base))))
    return path


def spoil(base: Path) -> None:
    """What people's tools leave in a model directory: all that must not get into an export."""
    backend = Tokenizer.from_file(str(base / "tokenizer.json"))
    backend.enable_truncation(30)
    backend.enable_padding(length=30)
    backend.save(str(base / "tokenizer.json"))
    sampling = {"do_sample": True, "temperature": 1.5, "repetition_penalty": 1.3, "max_length": 9}
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **sampling}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | sampling | {"eos_token_id": 1}))
    (base / "chat_template.jinja").write_text("[INST]{{ messages[0]['content'] }}[/INST]")


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_a_base_with_other_settings_gives_an_export_that_chats_as_it_was_trained(
    kind: str,
    run: Path,
    opened: Opened,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    # Prompts are compared all the same.
    monkeypatch.setattr(verify, "_PACKAGES", {kind: ("no_such_package",)})
    trained, to = on_another_base(run, tmp_path, spoil), tmp_path / "to"
    shown = quiet_export(trained, to, format=kind, dtype="float32", verify="auto")
    told = "The base's chat template renders other prompts than the run was trained on; Gemma's"
    assert told in shown and told in (to / "README.md").read_text()
    assert (to / "tokenizer.json").read_bytes() == (EMBEDDED / "tokenizer.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    [code] = snippets(to / "README.md")
    names, said = run_snippet(code)
    # It ended by itself, at the end of the turn, and is what the run answers.
    assert names["output"][0, -1].item() == 107
    assert said == f"{answer(opened, names['question'])}\n"


@pytest.mark.oracle
def test_a_chat_template_that_makes_other_prompts_is_not_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no logits are compared."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(chat_template, "_is_gemmas", lambda *_: True)
    monkeypatch.setattr(verify, "_PACKAGES", {"merged": ("no_such_package",)})
    trained = on_another_base(run, tmp_path, spoil)
    with pytest.raises(UserError, match=r"the chat template gives transformers another prompt for"):
        quiet_export(trained, tmp_path / "to", verify="auto")
    assert not (tmp_path / "to").exists()


# --- Elsewhere ---


@pytest.mark.oracle
def test_transformers_says_token_for_token_what_we_say(merged: Path, ours: list[str]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, attn_implementation="eager"
    )
    prompts = [render_prompt(question) for question in QUESTIONS]
    # Longer than the sliding window.
    assert all(len(tokenizer(prompt).input_ids) > model.config.sliding_window for prompt in prompts)
    theirs = [_continue(model, tokenizer, prompt) for prompt in prompts]
    assert theirs == ours
    assert len(set(theirs)) > 4


def _continue(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.oracle
def test_verified_exports_say_how_far_they_agree(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    found = r"logits differ by at most (\S+) \(\S+ in the mean\), and .* after ([\d.]+) % of 5\d\d"
    limits = {("merged", "float32"): 1e-4, ("merged", "bfloat16"): 1.0, ("peft", "float32"): 1e-4}
    for (kind, dtype), limit in limits.items():
        to = tmp_path / f"{kind}-{dtype}"
        shown = quiet_export(run, to, format=kind, dtype=dtype, verify="auto")
        for text in (shown, (to / "README.md").read_text()):
            largest, share = re.search(found, text).groups()  # type: ignore[union-attr]
            assert float(largest) < limit
            assert float(share) > (99.9 if dtype == "float32" else 90)


def test_what_is_not_verified_says_why(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_PACKAGES", {"peft": ("no_such_package",)})
    shown = quiet_export(run, tmp_path / "to", format="peft", verify="auto")
    assert "not compared with transformers: no_such_package not installed\n" in shown
    assert "was not run in transformers itself" in (tmp_path / "to" / "README.md").read_text()
    monkeypatch.setattr(verify, "_PACKAGES", {"peft": ()})
    assert verify.obstacle("peft", 1000) is None
    found = verify.obstacle("peft", 10**12)
    assert found and found.startswith("it takes 12000 GB of memory, and ")


@pytest.mark.oracle
def test_weights_that_are_mixed_up_are_noticed(
    merged: Path, opened: Opened, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    wrong = tmp_path / "wrong"
    shutil.copytree(merged, wrong)
    tensors = load_file(wrong / "model.safetensors")
    key, value = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")
    tensors[key], tensors[value] = tensors[value], tensors[key]
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    texts = [render_prompt(question) for question in QUESTIONS[:3]]
    assert opened.policy
    given = (opened.policy, opened.files)
    assert compare_with_transformers(*given, merged, texts).largest < 1e-4
    found = compare_with_transformers(*given, wrong, texts)
    assert found.largest > 0.5 and found.same_choice < 0.95


@pytest.mark.oracle
def test_an_export_that_does_not_agree_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(verify, "_LARGEST_DIFFERENCE", 0.0)
    with pytest.raises(UserError, match=r"transformers does not compute what the run does: logits"):
        quiet_export(run, tmp_path / "to", dtype="float32", verify="always")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_the_snippet_of_the_card_runs(
    kind: str,
    request: pytest.FixtureRequest,
    opened: Opened,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    folder = request.getfixturevalue(kind)
    [code] = snippets(folder / "README.md")
    monkeypatch.chdir(folder.parent)
    names, said = run_snippet(code)
    prompt = render_prompt(names["question"])
    assert names["inputs"]["input_ids"][0].tolist() == opened.files.tokenizer.encode(prompt)
    assert said == f"{answer(opened, names['question'])}\n"


@pytest.mark.oracle
def test_the_snippets_of_the_docs_run(
    merged: Path, adapter: Path, ours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    assert merged.parent == adapter.parent
    monkeypatch.chdir(merged.parent)
    codes = snippets(DOCS)
    assert len(codes) == 2
    for code in codes:
        names: dict[str, Any] = {}
        exec(code, names)
        model, tokenizer = names["model"].float(), names["tokenizer"]
        assert _continue(model, tokenizer, render_prompt(QUESTIONS[0])) == ours[0]


# --- The card ---


def test_the_card_tells_use_results_and_recipe(merged: Path) -> None:
    card = (merged / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert front.splitlines() == [
        "library_name: transformers",
        "license: apache-2.0",
        "pipeline_tag: text-generation",
        "tags:",
        "- grpo",
        "- lora",
        "- tunix",
    ]
    assert "Accuracy rose from 25.0\u00a0% to 75.0\u00a0% on 64 held-out problems" in body
    assert "| Right, greedy | 25.0 % | 75.0 % | +50.0 pp |" in body
    assert "| 95 % interval | 16 to 37 % | 63 to 84 % |" in body
    assert "but for these:\n\n| field | value |\n| --- | --- |\n| learning_rate | `0.5` |" in body
    assert "| SHA-256 of the data | abc |" in body
    assert "not run in transformers itself" in body
    assert "Gemma Terms" not in body


def test_the_card_of_an_adapter_names_its_library(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    assert "library_name: peft\n" in card and "PeftModel.from_pretrained(model, name)" in card
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with safe_open(adapter / "adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_card_has_what_evaluate_measured_of_the_same_steps(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "evaluated"
    shutil.copytree(run, path)
    systems = {
        name: System(greedy=greedy(correct, 200))
        for name, correct in (("base", 20), ("adapter", 120))
    }
    data = HeldOutData(source="openai/gsm8k", split="test")
    config = load_config("gemma2-2b-v5e8")
    for step, is_told in ((40, True), (39, False)):
        write(path, Evaluation(schema_version=1, step=step, data=data, systems=systems))
        card = render_card(
            Exported(
                path, config, 40, "merged", "bfloat16", "x", read_architecture(EMBEDDED), "Checked."
            )
        )
        assert ("on 200 openai/gsm8k test problems" in card) is is_told
        assert ("| Right, greedy | 10.0 % | 60.0 % | +50.0 pp |" in card) is is_told
        assert "| Right, greedy | 25.0 % | 75.0 % | +50.0 pp |" in card


def test_the_card_names_a_base_that_others_can_find(run: Path) -> None:
    config = load_config("gemma2-2b-v5e8")
    card = render_card(
        Exported(
            run, config, 40, "peft", "float32", "me/model", read_architecture(EMBEDDED), "Checked."
        )
    )
    assert "\nbase_model: google/gemma-2-2b-it\n" in card
    assert "\nlicense: gemma\n" in card and "Gemma Terms of Use" in card
    assert "## Verification\n\nChecked.\n" in card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/gemma-2-2b-it", "google/gemma-2-2b-it"),
        ("kaggle:google/gemma-2/transformers/gemma-2-2b-it", "google/gemma-2-2b-it"),
        ("kaggle:google/gemma-2/transformers/gemma-2-2b-it/2", "google/gemma-2-2b-it"),
        ("kaggle:google/gemma-2/flax/2b-it", None),
        ("kaggle:someone/gemma-2/transformers/mine", None),
        ("embedded", None),
        ("models/mine", None),
        ("/models/mine", None),
    ],
)
def test_a_hub_id_is_none_for_what_is_only_here(
    name: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) == expected


# --- Mistakes ---


def refused(tmp_path: Path, *arguments: Any, **options: Any) -> str:
    """The one line with which an export is refused; it leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        quiet_export(*arguments, **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    assert refused(tmp_path, "embedded", to) == (
        "run embedded: no such directory; give the directory of a run, such as runs/tiny"
    )
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(run / "config.toml", new)
    assert "has no checkpoint yet" in refused(tmp_path, new, to)
    assert refused(tmp_path, run, new) == f"{new}: is not empty; choose another --to"
    (new / "run.json").write_text('{"starts": []}')
    assert "run.json: has an older schema, without a version;" in refused(tmp_path, new, to)
    file = new / "config.toml"
    expected = f"{file / 'to'}: cannot be written (Not a directory); choose another --to"
    assert refused(tmp_path, run, file / "to") == expected
    for size in (0, float("nan")):
        assert "must be greater than 0" in refused(tmp_path, run, to, max_shard_gb=size)
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda _: None)
    assert refused(tmp_path, run, to, format="peft", verify="always").startswith(
        "--verify always needs torch, transformers, peft; pip install"
    )


def test_a_disk_without_room_is_refused_before_weights_load(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        atomic.shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=2_000_000)
    )
    to = tmp_path / "to"
    assert refused(tmp_path, run, to) == (
        f"{to}: 2 MB are free but about 51 MB are needed; free some space or choose another --to"
    )


@pytest.mark.parametrize("kind", ["merged", "peft"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_disk_that_fills_up_leaves_nothing(
    kind: str, is_there: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma2_grpo.model.save.save_file", full)
    to = tmp_path / "new" / "to"
    if is_there:
        to.mkdir(parents=True)
    assert refused(tmp_path, run, to, format=kind) == (
        f"{to}: could not be written (No space left on device); nothing is left of it"
    )


def test_what_a_killed_export_left_is_no_obstacle(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    for left in (tmp_path / ".new.tmp", there / ".partial"):
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half")
    for to in (tmp_path / "new", there):
        quiet_export(run, to)
        assert sorted(path.name for path in to.iterdir()) == MODEL_FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "there"]


# --- Uploading, with a stand-in for the hub's client ---


class Hub:
    """Keeps repositories in memory, with the calls of HfApi that are used."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.uploaded: dict[str, list[str]] = {}
        self.fails = False

    def __call__(self) -> "Hub":
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self.repositories.setdefault(repo_id, private)
        return type("Url", (str,), {"repo_id": repo_id})(f"https://huggingface.co/{repo_id}")

    def repo_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.repositories[repo_id])

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]
    ) -> None:
        assert commit_message and "*.safetensors" in delete_patterns
        if self.fails:
            raise ConnectionError("no route to hf_SECRETSECRETSECRETSECRET")
        self.uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Hub:
    remote = Hub()
    monkeypatch.setattr(hub, "HfApi", remote)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_SECRETSECRETSECRETSECRET")
    return remote


def test_an_upload_is_private_and_asked_for(
    run: Path, tmp_path: Path, remote: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    monkeypatch.setattr("sys.stdin", io.StringIO())
    message = refused(tmp_path, run, to, push="me/model")
    assert message == "--push asks before it uploads, and there is no terminal; add --yes"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    asked = []
    for answer in ("", "n"):
        monkeypatch.setattr("builtins.input", lambda text, a=answer: asked.append(text) or a)
        assert "not exported" in refused(tmp_path, run, to, push="me/model")
    assert asked[0].startswith("Upload to huggingface.co/me/model (private)")
    assert not remote.repositories
    monkeypatch.setattr("builtins.input", lambda _: "y")
    shown = quiet_export(run, to, push="me/model")
    assert "uploaded to https://huggingface.co/me/model" in shown
    assert "SECRET" not in shown
    assert remote.repositories == {"me/model": True}
    assert remote.uploaded == {"me/model": MODEL_FILES}
    assert 'name = "me/model"' in (to / "README.md").read_text()


def test_what_is_public_stays_untouched_unless_told(run: Path, tmp_path: Path, remote: Hub) -> None:
    remote.repositories["me/known"] = False
    with pytest.raises(UserError, match="me/known exists and is public"):
        quiet_export(run, tmp_path / "one", format="peft", push="me/known", yes=True)
    assert not remote.uploaded
    assert (tmp_path / "one" / "README.md").is_file()
    quiet_export(run, tmp_path / "two", format="peft", push="me/known", yes=True, public=True)
    assert list(remote.uploaded) == ["me/known"]


def test_a_failed_upload_keeps_the_export_and_the_secret(
    run: Path, tmp_path: Path, remote: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.fails = True
    to = tmp_path / "to"
    with pytest.raises(UserError) as caught:
        quiet_export(run, to, format="peft", push="me/model", yes=True)
    assert str(caught.value) == (
        f"{to} is written but not uploaded: no route to ...; check the network and the token, "
        f"then: hf upload me/model {to}"
    )
    assert (to / "adapter_model.safetensors").is_file()
    assert "is no repository" in refused(tmp_path, run, tmp_path / "x", push="a/b/c")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert refused(tmp_path, run, tmp_path / "x", push="a/b").startswith("--push needs a login")
