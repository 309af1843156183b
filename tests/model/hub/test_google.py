"""What is known of Google's models by name is what Tunix knows of them."""

from dataclasses import replace

import pytest
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3

from gemma2_grpo.model.architecture import Architecture, known_architecture
from gemma2_grpo.model.hub.google import google_family, known_config, kv_heads

NAMES = {
    "gemma-2-2b": ("google/gemma-2-2b-it", "kaggle:google/gemma-2/transformers/gemma-2-2b-it"),
    "gemma-2-9b": ("google/gemma-2-9b", "models/Gemma2-9b-mine"),
    "gemma-2-27b": ("google/gemma-2-27b-it",),
    "gemma-3-270m": ("google/gemma-3-270m-it", "unsloth/gemma-3-270m"),
    "gemma-3-1b": ("google/gemma-3-1b-it", "kaggle:google/gemma-3/transformers/gemma-3-1b-it/1"),
}


@pytest.mark.parametrize(("model", "names"), NAMES.items())
def test_names_that_contain_a_models_own(model: str, names: tuple[str, ...]) -> None:
    expected = known_config(model)
    assert expected is not None
    for name in names:
        assert known_config(name) == expected


@pytest.mark.parametrize(
    "name", ["/models/mine", "google/gemma-3-12b-it", "google/gemma-2b", "google/gemma-3-4b-it", ""]
)
def test_other_names_are_not_known(name: str) -> None:
    assert known_config(name) is None and known_architecture(name) is None
    assert kv_heads(name) == 4


def test_gemma_2_is_as_tunix_has_it() -> None:
    for size in ("2b", "9b"):
        tunix = getattr(Architecture, f"gemma2_{size}")()
        # Tunix counts some entries of the vocabulary that the published weights lack, and for 9B
        # the MLP units of gate and up together, as Google's report does.
        units = {"2b": 9216, "9b": 14_336}[size]
        expected = replace(tunix, num_embed=256_000, hidden_dim=units)
        assert known_architecture(f"gemma-2-{size}") == expected


@pytest.mark.parametrize("size", ["270m", "1b"])
def test_gemma_3_is_as_tunix_has_it(size: str) -> None:
    tunix = getattr(gemma3.ModelConfig, f"gemma3_{size}_it" if size == "1b" else "gemma3_270m")()
    found = known_architecture(f"gemma-3-{size}")
    assert found is not None and found.has_qk_norm
    for name in (
        "num_layers num_embed embed_dim hidden_dim num_heads head_dim num_kv_heads "
        "sliding_window_size"
    ).split():
        assert getattr(found, name) == getattr(tunix, name), name
    kinds = {gemma3.AttentionType.GLOBAL: False, gemma3.AttentionType.LOCAL_SLIDING: True}
    turns = gemma3.GEMMA3_ATTENTION_PATTERN
    assert found.is_sliding == tuple(kinds[turns[i % 6]] for i in range(found.num_layers))
    assert found.global_rope == (tunix.global_base_frequency, 1.0)
    assert found.sliding_rope == (tunix.local_base_frequency, 1.0)
    assert found.attention_types.count(gemma.AttentionType.GLOBAL) == found.num_layers // 6


def test_heads_and_families() -> None:
    assert [kv_heads(f"google/gemma-{name}") for name in ("2-27b", "3-1b-it", "2-2b")] == [16, 1, 4]
    assert google_family("google/gemma-2-2b-it") == "gemma-2"
    assert google_family("google/gemma-3-4b-it") == "gemma-3"
    assert google_family("unsloth/gemma-3-1b-it") is None
    assert google_family("google/gemma-7b") is None
