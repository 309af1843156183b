"""config.json of a Gemma 2 or 3: its sizes, and whether it is one that is computed here."""

import math
from dataclasses import dataclass
from pathlib import Path

from tunix.models.gemma import model as gemma

from gemma2_grpo.errors import UserError
from gemma2_grpo.model.config_json import EMPTY, JsonObject, check_known, read_config, refuse
from gemma2_grpo.model.hub.google import known_config


@dataclass(unsafe_hash=True)
class Architecture(gemma.ModelConfig):
    """Sizes of a model, as Tunix names them; hashable, so that `jit` takes it as static."""

    query_scalar: float = 256.0
    """Queries are divided by its square root; for some models it is not the size of a head."""
    has_qk_norm: bool = False
    """RMSNorm of each head's queries and keys before they are rotated, as Gemma 3 has it."""
    global_rope: tuple[float, float] = (10_000.0, 1.0)
    """Base of the rotary embedding (theta) in global layers, and what positions are divided by."""
    sliding_rope: tuple[float, float] = (10_000.0, 1.0)
    """The same in sliding layers."""

    @property
    def family(self) -> str:
        """Name of the family for people."""
        return "Gemma 3" if self.has_qk_norm else "Gemma 2"

    @property
    def is_sliding(self) -> tuple[bool, ...]:
        """For each layer, whether its tokens attend only within the sliding window."""
        return tuple(kind == gemma.AttentionType.LOCAL_SLIDING for kind in self.attention_types)


_SIZES = (
    "num_hidden_layers vocab_size hidden_size intermediate_size num_attention_heads head_dim "
    "num_key_value_heads final_logit_softcapping attn_logit_softcapping sliding_window"
).split()
_SOFTCAPS = ("final_logit_softcapping", "attn_logit_softcapping")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Base of the rotary embedding of Gemma 3, by kind of layer: its field up to transformers 4, and
# what transformers takes where that is absent.
_THETAS = {_SLIDING: ("rope_local_base_freq", 10_000.0), _FULL: ("rope_theta", 1_000_000.0)}
# What transformers takes where the field is absent.
_QUERY_SCALAR = 256

# Fields that decide what is computed, with the values that are computed here. Other fields of that
# kind are unknown, which is refused as well.
_FAMILIES: dict[str, dict[str, tuple[object, ...]]] = {
    "gemma2": {
        "architectures": (["Gemma2ForCausalLM"], None),
        "sliding_window_pattern": (2,),
        "_sliding_window_pattern": (2,),
    },
    "gemma3_text": {"architectures": (["Gemma3ForCausalLM"], None)},
}
_COMPUTED: dict[str, tuple[object, ...]] = {
    "rms_norm_eps": (1e-6,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (1.0, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
_ROPE: dict[str, tuple[object, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (1.0, None),
}
_GEMMA3_ROPE = {"rope_type", "type", "rope_theta", "factor"}

# Those that have a check of their own.
_CHECKED = frozenset(
    (
        *_SIZES,
        *_COMPUTED,
        "_sliding_window_pattern",
        "architectures",
        "layer_types",
        "model_type",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window_pattern",
        "sliding_window_size",
    )
)


def read_architecture(directory: Path) -> Architecture:
    """Reads the architecture of a Gemma 2 or Gemma 3 of any size from its Hugging Face config.json.

    Of a Gemma 3 with vision, only the text model can be read, from a directory of its own.

    Raises:
        UserError: if the file is missing or describes what is not computed here, and for a field
            that is not known, since it might.
    """
    return architecture_of(read_config(directory), directory / "config.json")


def known_architecture(name: str) -> Architecture | None:
    """The architecture of one of Google's text models by its name; None for all others."""
    values = known_config(name)
    return architecture_of(values, Path(name)) if values else None


def architecture_of(values: JsonObject, path: Path) -> Architecture:
    """The architecture that the fields of a config.json describe; `path` is named in errors.

    Raises:
        UserError: as `read_architecture`.
    """
    family = values.get("model_type")
    if family == "gemma3":
        raise UserError(
            f"{path}: model_type = 'gemma3' has a vision tower, and only text is computed here; "
            "save its text model by itself, as docs/troubleshooting.md shows, and pass that"
        )
    if family not in _FAMILIES:
        refuse(path, "model_type", family, " or ".join(map(repr, _FAMILIES)))
    for name, computed in (_COMPUTED | _FAMILIES[family]).items():
        if not any(_is_same(values.get(name, computed[0]), each) for each in computed):
            refuse(path, name, values[name], repr(computed[0]))
    is_gemma3 = family == "gemma3_text"
    if is_gemma3:  # Which has no soft caps, and may leave them out.
        for name in _SOFTCAPS:
            values.setdefault(name, None)
    _check_sizes(path, values)
    kinds = _layer_kinds(path, values)
    ropes = dict.fromkeys(_THETAS, (10_000.0, 1.0))
    if is_gemma3:
        ropes = {kind: _gemma3_rope(path, values, kind) for kind in _THETAS}
    else:
        _check_rope(path, values)
    check_known(path, values, _CHECKED)
    types = {_SLIDING: gemma.AttentionType.LOCAL_SLIDING, _FULL: gemma.AttentionType.GLOBAL}
    return Architecture(
        num_layers=len(kinds),
        num_embed=values["vocab_size"],
        embed_dim=values["hidden_size"],
        hidden_dim=values["intermediate_size"],
        num_heads=values["num_attention_heads"],
        head_dim=values["head_dim"],
        num_kv_heads=values["num_key_value_heads"],
        final_logit_softcap=values["final_logit_softcapping"],
        attn_logits_soft_cap=values["attn_logit_softcapping"],
        sliding_window_size=values["sliding_window"],
        attention_types=tuple(types[kind] for kind in kinds),
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        query_scalar=float(values.get("query_pre_attn_scalar", _QUERY_SCALAR)),
        has_qk_norm=is_gemma3,
        global_rope=ropes[_FULL],
        sliding_rope=ropes[_SLIDING],
    )


def _is_same(value: object, computed: object) -> bool:
    """Whether a field has a value, numbers up to float32, in which some tools keep them."""
    if type(value) is float and type(computed) is float:
        return math.isclose(value, computed, rel_tol=1e-6)
    return value == computed


def _check_sizes(path: Path, values: JsonObject) -> None:
    missing = [name for name in _SIZES if name not in values]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; is it a Gemma 2 or 3?")
    sizes = {name: values[name] for name in _SIZES}
    sizes["query_pre_attn_scalar"] = values.get("query_pre_attn_scalar", _QUERY_SCALAR)
    for name, value in sizes.items():
        if name in _SOFTCAPS and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{path}: {name} = {value!r} is no number; put the model's own file there"
            )
        may_be_broken = name in _SOFTCAPS or name == "query_pre_attn_scalar"
        if not value > 0 or not (may_be_broken or isinstance(value, int)):
            kind = "number" if may_be_broken else "whole number"
            refuse(path, name, value, f"a {kind} above 0")
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        refuse(path, "num_key_value_heads", kv_heads, f"what divides the {heads} heads")


def _check_rope(path: Path, values: JsonObject) -> None:
    """Refuses other rotary embeddings for Gemma 2 than those of angle 10,000.

    Flat up to transformers 4; from 5 on in `rope_parameters`, which `rope_scaling` overrides.
    """
    blocks = {name: values.get(name) for name in ("rope_parameters", "rope_scaling")}
    nested = [block for block in blocks.values() if isinstance(block, dict)]
    for block in (values, *nested):
        theta = block.get("rope_theta")
        if theta not in (10_000, None):
            raise UserError(f"{path}: rope_theta = {theta} is not supported")
    for name, block in blocks.items():
        if block in EMPTY:
            continue
        is_default = isinstance(block, dict) and all(
            value in _ROPE.get(field, ()) for field, value in block.items() if field != "rope_theta"
        )
        if not is_default:
            refuse(path, name, block, "rope_type default")


def _gemma3_rope(path: Path, values: JsonObject, kind: str) -> tuple[float, float]:
    """Theta and factor of the rotary embedding of a kind of layer of Gemma 3.

    Flat up to transformers 4; from 5 on in a block for each kind of layer. `rope_scaling` is of
    global layers alone.
    """
    field, default = _THETAS[kind]
    parameters, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    for name, block in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(block, dict):
            refuse(path, name, block, "an object")
    # What transformers 5 writes beside the blocks says nothing.
    beside = {name: value for name, value in parameters.items() if name not in _THETAS}
    if any(value not in (*EMPTY, "default") for value in beside.values()) or (
        beside and not parameters.keys() & _THETAS.keys()
    ):
        refuse(path, "rope_parameters", parameters, f"a block for {' and '.join(_THETAS)}")
    block = {**(parameters.get(kind) or {}), **(scaling if kind == _FULL else {})}
    rope_type = block.get("rope_type", block.get("type", "default"))
    if rope_type not in ("default", "linear") or not block.keys() <= _GEMMA3_ROPE:
        name = "rope_scaling" if scaling else "rope_parameters"
        refuse(path, name, values[name], "rope_type default or linear")
    theta = block.get("rope_theta", values.get(field, default))
    factor = block.get("factor", 1.0) if rope_type == "linear" else 1.0
    for name, number in ((field, theta), ("factor", factor)):
        if type(number) not in (int, float) or not number > 0:
            refuse(path, name, number, "a number above 0")
    return float(theta), float(factor)


def _layer_kinds(path: Path, values: JsonObject) -> list[str]:
    """Kind of each layer: those of Gemma 2 take turns, of Gemma 3 every sixth is usually global."""
    layers, window = values["num_hidden_layers"], values["sliding_window"]
    is_gemma3 = values["model_type"] == "gemma3_text"
    names = ("sliding_window_pattern", "_sliding_window_pattern") if is_gemma3 else ()
    period = next((values[name] for name in names if values.get(name)), 6 if is_gemma3 else 2)
    turns = [_SLIDING if (i + 1) % period else _FULL for i in range(layers)]
    kinds = values.get("layer_types") or turns
    if not is_gemma3 and kinds != turns:
        only = f"{_SLIDING} in turn with {_FULL}, {layers} layers in all,"
        refuse(path, "layer_types", kinds, only)
    if len(kinds) != layers or not set(kinds) <= {_SLIDING, _FULL}:
        refuse(path, "layer_types", kinds, f"a list of {layers}, each {_SLIDING} or {_FULL},")
    if values.get("sliding_window_size") not in (window, None):
        refuse(path, "sliding_window_size", values["sliding_window_size"], str(window))
    return kinds
