"""What an export has beside its weights makes it chat as it was trained, and end its turns."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures.models import EMBEDDED

from gemma2_grpo.config import ModelConfig
from gemma2_grpo.model.chat_template import CHAT_TEMPLATE, user_turn
from gemma2_grpo.model.open import open_files
from gemma2_grpo.model.save import write_settings, write_tokenizer
from gemma2_grpo.model.tokenizer import Tokenizer
from gemma2_grpo.task.prompts import render_prompt

QUESTION = "Anna has 5 pens and buys 7 more. How many pens does she have?"
ALIEN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Gemma's, written in another way, as other tools do; it takes a system turn as well.
SAME = (
    "{{ bos_token }}{%- for m in messages %}\n"
    "    {%- if m['role'] == 'system' %}{% continue %}{% endif %}\n"
    "    {{- '<start_of_turn>' + m['role'] + '\n' + m['content'].strip() + '<end_of_turn>\n' }}\n"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
FILE, NAMED = "chat_template.jinja", "additional_chat_templates/tool_use.jinja"
SETTING = "tokenizer_config.json"
NONE_TOLD = "The base has no chat template; Gemma's, which was trained on, was added."
ALIEN_TOLD = (
    "The base's chat template renders other prompts than the run was trained on; Gemma's, which "
    "was trained on, is in its place."
)
# Templates of the base by where they are, what is told, and which of them the export keeps.
BASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "none": ({}, NONE_TOLD, {}),
    "in a file": ({FILE: SAME}, "", {FILE: SAME}),
    "in the settings": ({SETTING: SAME}, "", {SETTING: SAME}),
    "by name in the settings": (
        {SETTING: [{"name": "default", "template": SAME}]},
        "",
        {SETTING: [{"name": "default", "template": SAME}]},
    ),
    "with others": ({FILE: SAME, NAMED: ALIEN}, "", {FILE: SAME, NAMED: ALIEN}),
    # Tools that know no file read the settings.
    "in both, the file is right": ({FILE: SAME, SETTING: ALIEN}, "", {FILE: SAME, SETTING: SAME}),
    "in both, the settings are right": ({FILE: ALIEN, SETTING: SAME}, ALIEN_TOLD, {}),
    "alien file": ({FILE: ALIEN, NAMED: ALIEN}, ALIEN_TOLD, {}),
    "alien settings": ({SETTING: ALIEN}, ALIEN_TOLD, {}),
    "others alone": ({NAMED: ALIEN}, NONE_TOLD, {}),
    "no template at all": ({FILE: "{% for"}, ALIEN_TOLD, {}),
    "a template that refuses": ({FILE: "{{ raise_exception('no') }}"}, ALIEN_TOLD, {}),
    "a template that asks for tools": ({FILE: "{{ tools[0].name }}"}, ALIEN_TOLD, {}),
    "null": ({SETTING: None}, NONE_TOLD, {}),
}


def make_base(folder: Path, templates: dict[str, Any], **settings: Any) -> Path:
    """The embedded model with its chat templates in these places alone."""
    shutil.copytree(EMBEDDED, folder)
    values = json.loads((folder / SETTING).read_text()) | settings
    del values["chat_template"]
    for name, template in templates.items():
        if name == SETTING:
            values["chat_template"] = template
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(template)
    (folder / SETTING).write_text(json.dumps(values))
    return folder


def write_export(base: Path, to: Path) -> str:
    to.mkdir()
    told = write_settings(to, base, "float32")
    shutil.copy(EMBEDDED / "model.safetensors", to)
    return told


def chat_ids(folder: Path) -> list[int]:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        user_turn(QUESTION), add_generation_prompt=True, return_dict=True
    )["input_ids"]


@pytest.mark.parametrize("kind", BASES)
def test_an_export_has_the_template_that_was_trained_on(kind: str, tmp_path: Path) -> None:
    templates, told, kept = BASES[kind]
    base, to = make_base(tmp_path / "base", templates), tmp_path / "to"
    assert write_export(base, to) == told
    settings = json.loads((to / SETTING).read_text())
    found = {name: (to / name).read_text() for name in (FILE, NAMED) if (to / name).exists()}
    found |= {SETTING: settings["chat_template"]} if "chat_template" in settings else {}
    if told:
        places = {FILE, SETTING} if SETTING in templates else {FILE}
        written = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ '<bos>' }}")
        assert found == dict.fromkeys(places, written)
    else:
        assert found == kept


@pytest.mark.oracle
@pytest.mark.parametrize("write", [write_settings, write_tokenizer])
@pytest.mark.parametrize("kind", BASES)
def test_transformers_makes_the_prompts_of_the_run(
    kind: str, write: Callable[..., str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    base, to = make_base(tmp_path / "base", BASES[kind][0]), tmp_path / "to"
    to.mkdir()
    write(to, base, *["float32"] * (write is write_settings))
    assert chat_ids(to) == tokenizer.encode(render_prompt(QUESTION))


@pytest.mark.oracle
@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": None},
        {"bos_token": "<eos>"},
        {"bos_token": {"content": "<bos>", "lstrip": False}},
        {"add_bos_token": False, "add_eos_token": True},
        {"model_max_length": 8, "truncation_side": "left", "padding_side": "right"},
    ],
    ids=str,
)
@pytest.mark.parametrize("templates", [{}, {FILE: SAME}, {SETTING: SAME}])
def test_whatever_else_the_settings_say(
    templates: dict[str, Any], settings: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_export(make_base(tmp_path / "base", templates, **settings), tmp_path / "to")
    assert chat_ids(tmp_path / "to") == tokenizer.encode(render_prompt(QUESTION))


@pytest.mark.oracle
@pytest.mark.parametrize("templates", [{}, {FILE: SAME}])
def test_a_base_without_settings_of_its_tokenizer(
    templates: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", templates)
    (base / SETTING).unlink()
    (base / "special_tokens_map.json").unlink()
    write_export(base, tmp_path / "to")
    assert chat_ids(tmp_path / "to") == tokenizer.encode(render_prompt(QUESTION))


# --- Where answers end ---

SAMPLING = {
    "do_sample": True,
    "max_length": 30,
    "max_new_tokens": 3,
    "repetition_penalty": 1.5,
    "suppress_tokens": [107],
    "temperature": 2.0,
    "top_k": 3,
    "top_p": 0.5,
}
STOPS = {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}


@pytest.mark.parametrize(
    "generation", [None, {"eos_token_id": 1}, {"eos_token_id": 1, "_from_model_config": True}]
)
def test_an_export_stops_where_the_run_did_and_is_sampled_as_anybody_likes(
    generation: dict[str, Any] | None, tmp_path: Path
) -> None:
    base, to = make_base(tmp_path / "base", {}), tmp_path / "to"
    config = json.loads((base / "config.json").read_text())
    others = {"eos_token_id": 1, "pad_token_id": None, "_name_or_path": "/home/me/gemma"}
    old = {"dtype": "bfloat16", "task_specific_params": {"text-generation": {"do_sample": True}}}
    (base / "config.json").write_text(json.dumps(config | SAMPLING | others | old))
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation | SAMPLING))
    write_export(base, to)
    assert json.loads((to / "generation_config.json").read_text()) == STOPS
    kinds = {"dtype": "float32", "torch_dtype": "float32"}
    assert json.loads((to / "config.json").read_text()) == config | STOPS | kinds


@pytest.mark.oracle
def test_transformers_ends_at_the_end_of_the_turn(tmp_path: Path) -> None:
    """The embedded model ends its turns; a base that stops at <eos> alone would go on."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    base, to = make_base(tmp_path / "base", {}), tmp_path / "to"
    config = json.loads((base / "config.json").read_text()) | {"eos_token_id": 1}
    (base / "config.json").write_text(json.dumps(config))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    write_export(base, to)
    prompt = torch.tensor([chat_ids(to)])
    ends = {}
    for folder in (base, to):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        output = model.generate(prompt, max_new_tokens=100, do_sample=False)[0].tolist()
        ends[folder] = output[prompt.shape[1] :]
    assert len(ends[base]) == 100 and ends[base].count(107) >= 1
    assert ends[to] == ends[base][: ends[base].index(107) + 1]


@pytest.mark.parametrize(("template", "is_told"), [(ALIEN, True), (SAME, False), (None, False)])
def test_a_model_that_was_trained_on_other_prompts_is_told_of(
    template: str | None, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / "base", {FILE: template} if template else {})
    config = ModelConfig(model=str(base), dtype="float32", mesh_shape=(1, 1))
    open_files(config, needs_weights=False)
    expected = (
        f"warning: {base}: its chat template makes other prompts than Gemma's turns, which are "
        "used here; take a model that was trained on those"
    )
    assert caplog.messages == ([expected] if is_told else [])
