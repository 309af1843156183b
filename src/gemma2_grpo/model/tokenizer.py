"""Gemma's tokenizer and chat template: special tokens resolved, and prompts as trained on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HfTokenizer

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.architecture import read_architecture
from gemma2_grpo.model.config_json import read_object
from gemma2_grpo.task.prompts import INSTRUCTION, STOP_TOKENS, render_prompt

# Rows and prompts are padded to this, or to a power of two of it; each width is more programs.
LEAST_TOKENS = 64
_FILE = "tokenizer.json"
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<start_of_turn>", *STOP_TOKENS)
# Whatever stands beside a special token, it is one token, and takes nothing of its neighbours.
_SURROUNDINGS = ("a{}b", " \n{}\n ")

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


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face fast tokenizer with the special tokens of Gemma resolved.

    It has the methods that Tunix asks of a tokenizer.
    """

    backend: HfTokenizer
    pad: int
    bos: int
    stop_ids: tuple[int, ...]

    def encode(self, text: str, **_: Any) -> list[int]:
        """Token ids of text that already carries its special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Any, **_: Any) -> str:
        """Text of token ids without the stop tokens at its end.

        Other special tokens stay: a completion with padding in it should be seen to have some.
        """
        tokens = [int(i) for i in ids]
        while tokens and tokens[-1] in self.stop_ids:
            tokens.pop()
        return self.backend.decode(tokens, skip_special_tokens=False)

    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.pad

    def bos_id(self) -> int:
        """Id of the token that begins every text."""
        return self.bos

    def eos_id(self) -> int:
        """Id of the token that ends Gemma's turn."""
        return self.stop_ids[0]


def load_tokenizer(directory: Path) -> Tokenizer:
    """Loads tokenizer.json from a model directory.

    Raises:
        UserError: if it is missing or unreadable, is not Gemma's, or has tokens that the model of
            the directory has no embedding for.
    """
    path = directory / _FILE
    text = read_tokenizer(directory)
    try:
        backend = HfTokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
        raise _not_readable(path, error) from None
    ids = {name: backend.token_to_id(name) for name in _SPECIAL_TOKENS}
    for name, token in ids.items():
        if token is None:
            raise UserError(f"{path}: has no token {name}; is it Gemma's tokenizer?")
        _check_special(path, backend, name, token)
    _check_embedded(path, backend, read_architecture(directory).num_embed)
    return Tokenizer(backend, ids["<pad>"], ids["<bos>"], tuple(ids[n] for n in STOP_TOKENS))


def read_tokenizer(directory: Path) -> str:
    """Reads tokenizer.json without the state of earlier calls that its library saves there.

    That is how texts were cut and padded, and the dropout of merges, by which the same text has
    other tokens each time. All of it would change prompts in silence.

    Raises:
        UserError: if the file is missing or unreadable.
    """
    path = directory / _FILE
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        blocks = [(content, "truncation"), (content, "padding"), (content["model"], "dropout")]
        saved = [(block, name) for block, name in blocks if block.get(name) is not None]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_readable(path, error) from None
    if not saved:
        return text
    for block, name in saved:
        block[name] = None
    return json.dumps(content, indent=2, ensure_ascii=False)


def _not_readable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable tokenizer ({error})")


def _check_special(path: Path, backend: HfTokenizer, name: str, token: int) -> None:
    """Refuses a special token that is split, or that takes in the white space beside it."""
    for surrounding in _SURROUNDINGS:
        text = surrounding.format(name)
        encoded = backend.encode(text, add_special_tokens=False)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        found = [text[start:end] for i, (start, end) in spans if i == token]
        if found != [name]:
            raise UserError(
                f"{path}: reads {text!r} without {name} as one token of its own; take Gemma's own "
                "tokenizer.json, whose special tokens have lstrip, rstrip and single_word false"
            )


def _check_embedded(path: Path, backend: HfTokenizer, vocab_size: int) -> None:
    """Refuses tokens for which the model has no embedding."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    beyond = sorted((token, name) for name, token in vocabulary.items() if token >= vocab_size)
    if beyond:
        token, name = beyond[0]
        raise UserError(
            f"{path}: {len(beyond)} tokens, such as {name!r} with id {token}, are beyond the "
            f"embedding of vocab_size = {vocab_size} in config.json; take the tokenizer that "
            "belongs to the model, or enlarge the model's embedding"
        )


def bucket(size: int, smallest: int, limit: int) -> int:
    """The least of smallest, 2 x smallest, 4 x smallest, ..., limit that holds a size.

    Raises:
        ValueError: if the limit does not hold it.
    """
    if size > limit:
        raise ValueError(f"{size} is more than the limit of {limit}")
    width = min(smallest, limit)
    while width < size:
        width = min(2 * width, limit)
    return width


def pad_right(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    """Right-pads token ids to [B, width].

    Raises:
        ValueError: if a row is longer; cutting a prompt would change the question.
    """
    padded = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise ValueError(f"prompt of {len(row)} tokens exceeds max_prompt_tokens = {width}")
        padded[i, : len(row)] = row
    return padded


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


def _read_settings(directory: Path) -> dict[str, Any]:
    """What tokenizer_config.json holds.

    Raises:
        UserError: if it cannot be read.
    """
    path = directory / "tokenizer_config.json"
    return read_object(path, "not readable ({}); put the model's own there")


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _find_templates(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
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


def _is_gemmas(template: str, settings: dict[str, Any]) -> bool:
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
