"""The chat template of a model, and whether it makes the prompts that are trained on."""

import json
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.config_json import JsonObject, read_object
from gemma2_grpo.task.prompts import INSTRUCTION, render_prompt

TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers 5 keeps the template."""
TEMPLATE_FOLDER = "additional_chat_templates"
"""Where it keeps others, by name."""

# Gemma 2's own template, which refuses a system turn and turns that do not alternate.
_TURNS = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHAT_TEMPLATE = "{{ bos_token }}" + _TURNS
"""Gemma 2's."""
# The same where the base's settings name another first token, or none.
_WRITTEN = "{{ '<bos>' }}" + _TURNS

_QUESTION = "Tom has 3 boxes with 4 pens in each.\nHow many pens does he have?"


def user_turn(question: str) -> list[dict[str, str]]:
    """The messages of a prompt, as a model card has them."""
    return [{"role": "user", "content": f"{INSTRUCTION}\n\n{question}"}]


def write_chat_template(folder: Path, source: Path) -> str:
    """Gives a model directory a chat template that renders the prompts that were trained on.

    That is the base's if it does, else Gemma's. `folder` has the base's tokenizer_config.json.

    Returns:
        What to tell about it; empty if it is the base's.
    """
    settings = _read_settings(folder)
    named = _find_templates(source, settings)
    template = named.get("default")
    if template is not None and _is_gemmas(template, settings):
        if (source / TEMPLATE_FILE).is_file():
            _copy_templates(folder, named)
            if "chat_template" in settings:  # Others read it there, and it may be another.
                _write_settings(folder, {**settings, "chat_template": template})
        return ""
    (folder / TEMPLATE_FILE).write_text(_WRITTEN, encoding="utf-8")
    if "chat_template" in settings:
        _write_settings(folder, {**settings, "chat_template": _WRITTEN})
    if template is None:
        return "The base has no chat template; Gemma's, which was trained on, was added."
    return (
        "The base's chat template renders other prompts than the run was trained on; Gemma's, "
        "which was trained on, is in its place."
    )


def makes_other_prompts(directory: Path) -> bool:
    """Whether a model has a chat template that renders other prompts than are trained on."""
    try:
        settings = _read_settings(directory)
        template = _find_templates(directory, settings).get("default")
    except (UserError, OSError, UnicodeDecodeError):  # It need not have any.
        return False
    return template is not None and not _is_gemmas(template, settings)


def _read_settings(directory: Path) -> JsonObject:
    """What tokenizer_config.json holds.

    Raises:
        UserError: if it cannot be read.
    """
    path = directory / "tokenizer_config.json"
    return read_object(path, "not readable ({}); put the model's own there")


def _write_settings(folder: Path, settings: JsonObject) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _find_templates(directory: Path, settings: JsonObject) -> dict[str, str]:
    """Templates by name, as transformers finds them: files come before tokenizer_config.json."""
    files = {path.stem: path for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (directory / TEMPLATE_FILE).is_file():
        files["default"] = directory / TEMPLATE_FILE
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    template = settings.get("chat_template")
    if isinstance(template, list):
        pairs = [each for each in template if isinstance(each, dict)]
        return {str(each.get("name")): str(each.get("template")) for each in pairs}
    return {} if template is None else {"default": str(template)}


def _copy_templates(folder: Path, named: dict[str, str]) -> None:
    for name, template in named.items():
        path = folder / (TEMPLATE_FILE if name == "default" else f"{TEMPLATE_FOLDER}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def _is_gemmas(template: str, settings: JsonObject) -> bool:
    """Whether a template renders a prompt as `render_prompt` does."""

    def refuse(message: str) -> None:
        raise ValueError(message)

    # As transformers renders them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    tokens = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    texts = {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items() if t}
    try:
        text = environment.from_string(template).render(
            messages=user_turn(_QUESTION), add_generation_prompt=True, **texts
        )
    except Exception:  # A template is a program, which may raise anything.
        return False
    return text == render_prompt(_QUESTION)
