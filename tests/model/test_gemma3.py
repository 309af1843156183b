"""Gemma 3: its config.json in both layouts, its weights, and what it computes."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file

from gemma2_grpo.model.architecture import read_architecture
from gemma2_grpo.model.gemma import run_from_start
from gemma2_grpo.model.load import load_weights
from gemma2_grpo.model.logprobs import output_logits
from gemma2_grpo.model.mesh import make_mesh
from gemma2_grpo.model.save import save_model
from gemma2_grpo.model.weights import Model, split_model
from gemma2_grpo.sampling.tunix import check_engine

# google/gemma-3-1b-it as transformers 4.50 wrote it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
KINDS = [("full_attention" if i % 6 == 5 else "sliding_attention") for i in range(26)]
FLAT = ("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern")
# As transformers 5 writes it.
NESTED: dict[str, Any] = {name: v for name, v in PUBLISHED.items() if name not in FLAT} | {
    "_sliding_window_pattern": 6,
    "dtype": "bfloat16",
    "layer_types": KINDS,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 10000, "rope_type": "default"},
    },
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(values: dict[str, Any], **changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(values | changes))
        return tmp_path

    return write


class TestConfig:
    @pytest.mark.parametrize("values", [PUBLISHED, NESTED], ids=["flat", "nested"])
    def test_both_layouts_are_read_alike(
        self, values: dict[str, Any], write: Callable[..., Path]
    ) -> None:
        found = read_architecture(write(values))
        assert [i for i, sliding in enumerate(found.is_sliding) if not sliding] == [5, 11, 17, 23]
        assert (found.num_layers, found.num_kv_heads, found.sliding_window_size) == (26, 1, 512)
        assert (found.global_rope, found.sliding_rope) == ((1e6, 1.0), (1e4, 1.0))
        assert found.has_qk_norm and found.query_scalar == 256
        assert (found.attn_logits_soft_cap, found.final_logit_softcap) == (None, None)

    def test_what_transformers_5_writes_beside_the_blocks(self, write: Callable[..., Path]) -> None:
        """In the text model of one with vision."""
        beside = NESTED["rope_parameters"] | {"rope_theta": None, "rope_type": "default"}
        found = read_architecture(write(NESTED, rope_parameters=beside))
        assert (found.global_rope, found.sliding_rope) == ((1e6, 1.0), (1e4, 1.0))

    def test_an_epsilon_in_float32(self, write: Callable[..., Path]) -> None:
        """As readers of GGUF files write it."""
        for epsilon in (9.99999997e-07, float(np.float32(1e-6))):
            assert read_architecture(write(PUBLISHED, rms_norm_eps=epsilon)).num_layers == 26

    def test_what_files_leave_out(self, write: Callable[..., Path]) -> None:
        """As the text models of 4B and larger do."""
        absent = (*FLAT, "attn_logit_softcapping", "final_logit_softcapping")
        values = {name: value for name, value in PUBLISHED.items() if name not in absent}
        scaling = {"rope_type": "linear", "factor": 8.0}
        found = read_architecture(write(values, rope_scaling=scaling))
        assert (found.global_rope, found.sliding_rope) == ((1e6, 8.0), (1e4, 1.0))
        assert sum(found.is_sliding) == 22

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"model_type": "gemma3"}, "model_type"),
            ({"model_type": "gemma"}, "model_type"),
            ({"model_type": "gemma4"}, "model_type"),
            ({"model_type": "paligemma"}, "model_type"),
            ({"model_type": "gemma3n"}, "model_type"),
            ({"architectures": ["Gemma3ForConditionalGeneration"]}, "architectures"),
            ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling"),
            ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
            ({"rope_scaling": {"rope_type": "linear", "attention_factor": 2}}, "rope_scaling"),
            ({"rope_scaling": [8]}, "rope_scaling"),
            ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
            ({"rope_parameters": {"full_attention": {}, "rope_theta": 5}}, "rope_parameters"),
            ({"rope_parameters": {"full_attention": {"rope_type": "llama3"}}}, "rope_parameters"),
            ({"rope_theta": -1}, "rope_theta"),
            ({"rope_local_base_freq": "10k"}, "rope_local_base_freq"),
            ({"layer_types": KINDS[:-1]}, "layer_types"),
            ({"layer_types": ["chunked_attention"] * 26}, "layer_types"),
            ({"vision_config": {"hidden_size": 1152}}, "vision_config"),
        ],
    )
    def test_what_is_not_computed_is_refused_by_name(
        self,
        changes: dict[str, Any],
        named: str,
        write: Callable[..., Path],
        refusal: Callable[..., str],
    ) -> None:
        directory = write(PUBLISHED, **changes)
        message = refusal(read_architecture, directory)
        assert message.startswith(f"{directory}/config.json: {named} = ")

    def test_tunix_engines_are_refused(
        self, write: Callable[..., Path], refusal: Callable[..., str]
    ) -> None:
        architecture = read_architecture(write(PUBLISHED))
        check_engine("group", architecture)
        assert refusal(check_engine, "vllm", architecture) == (
            "engine = vllm: not compared with Gemma 3's norms of queries and keys; "
            "set engine = group"
        )

    @pytest.mark.oracle
    def test_every_field_of_transformers_is_known(self, write: Callable[..., Path]) -> None:
        transformers = pytest.importorskip("transformers")
        made = transformers.Gemma3TextConfig(**PUBLISHED).to_dict()
        assert read_architecture(write(made)) == read_architecture(write(PUBLISHED))


@jax.jit(static_argnames="forward")
def _logits(forward: Any, weights: Any, tokens: jax.Array) -> jax.Array:
    hidden, _ = run_from_start(forward, weights, tokens)
    return output_logits(forward, weights, hidden)


def logits_of(model: Model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(*split_model(model), jnp.asarray(tokens)))


class TestWeights:
    @pytest.mark.parametrize("heads", [1, 2, 4])
    def test_they_come_back_to_the_bit(
        self, heads: int, goldens: ModuleType, mesh: Mesh, tmp_path: Path
    ) -> None:
        values = goldens.SMALL3 | {"num_key_value_heads": heads}
        source = goldens.write_model(tmp_path / "source", values, seed=1)
        model = load_weights(source, "float32", mesh)
        save_model(model, tmp_path, "float32")
        before = load_file(source / "model.safetensors")
        after = load_file(tmp_path / "model.safetensors")
        assert after.keys() == before.keys() and len(after) == 2 + 6 * 13
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)

    @pytest.mark.parametrize(("heads", "shape"), [(1, (8, 1)), (4, (2, 4))])
    def test_logits_do_not_depend_on_the_mesh(
        self, heads: int, shape: tuple[int, int], goldens: ModuleType, mesh: Mesh, tmp_path: Path
    ) -> None:
        values = goldens.SMALL3 | {"num_key_value_heads": heads}
        directory = goldens.write_model(tmp_path, values, seed=1)
        tokens = np.random.default_rng(0).integers(3, 64, (8, 20)).astype(np.int32)
        wide = load_weights(directory, "float32", make_mesh(shape))
        expected = logits_of(load_weights(directory, "float32", mesh), tokens)
        np.testing.assert_allclose(logits_of(wide, tokens), expected, atol=5e-5)

    def test_each_part_matters(self, goldens: ModuleType, mesh: Mesh, tmp_path: Path) -> None:
        """So that agreement with transformers says something about it."""
        tokens, _ = goldens.padded_tokens(64, seed=1)
        directory = goldens.write_model(tmp_path / "as is", goldens.SMALL3, seed=3)
        model = load_weights(directory, "float32", mesh)
        reference = logits_of(model, tokens)
        for name, value in [
            ("rope_scaling", None),
            ("rope_theta", 1000.0),
            ("rope_local_base_freq", 1000.0),
            ("sliding_window", 20),
            ("sliding_window_pattern", 2),
            ("query_pre_attn_scalar", 8),
        ]:
            other = goldens.write_model(tmp_path / name, goldens.SMALL3 | {name: value}, seed=3)
            logits = logits_of(load_weights(other, "float32", mesh), tokens)
            assert abs(logits - reference).max() > 0.01, name
        for name in ("q_norm", "k_norm"):
            scale = getattr(model.layers[2].attn, name).scale
            before = scale.get_value()
            scale.set_value(jnp.zeros_like(before))
            assert abs(logits_of(model, tokens) - reference).max() > 0.01, name
            scale.set_value(before)

    @pytest.mark.oracle
    @pytest.mark.parametrize("heads", [1, 2, 4])
    @pytest.mark.parametrize("factor", [1.0, 8.0])
    def test_logits_are_those_of_transformers(
        self, heads: int, factor: float, goldens: ModuleType, mesh: Mesh, tmp_path: Path
    ) -> None:
        pytest.importorskip("torch")
        values = goldens.SMALL3 | {
            "num_key_value_heads": heads,
            "rope_scaling": {"rope_type": "linear", "factor": factor},
        }
        directory = goldens.write_model(tmp_path, values, seed=5)
        tokens, is_real = goldens.padded_tokens(64, seed=6)
        expected = goldens.transformers_logits(directory, tokens, is_real)
        found = logits_of(load_weights(directory, "float32", mesh), tokens)
        np.testing.assert_allclose(found[is_real], expected[is_real], atol=1e-4)

    def test_a_norm_of_heads_is_on_every_device(
        self, goldens: ModuleType, wide_mesh: Mesh, tmp_path: Path
    ) -> None:
        values = goldens.SMALL3 | {"num_key_value_heads": 4}
        model = load_weights(goldens.write_model(tmp_path, values, 1), "bfloat16", wide_mesh)
        found = dict(nnx.to_flat_state(nnx.state(model)))
        scale = found["layers", 0, "attn", "q_norm", "scale"].get_value()
        assert scale.sharding.is_fully_replicated and scale.shape == (8,)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
def test_the_text_model_of_one_with_vision(
    mesh: Mesh, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    """Saved by itself as docs/troubleshooting.md shows; the whole is refused."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 12,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    assert refusal(read_architecture, tmp_path / "whole") == (
        f"{tmp_path}/whole/config.json: model_type = 'gemma3' has a vision tower, and only text is "
        "computed here; save its text model by itself, as docs/troubleshooting.md shows, and pass "
        "that"
    )
    alone = transformers.Gemma3ForCausalLM(whole.config.text_config)
    alone.model, alone.lm_head = whole.model.language_model, whole.lm_head
    alone.save_pretrained(tmp_path / "text")
    tokens = np.random.default_rng(0).integers(3, 64, (2, 20)).astype(np.int32)
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    found = logits_of(load_weights(tmp_path / "text", "float32", mesh), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
