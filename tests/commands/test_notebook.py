"""A notebook finds out where it is, what to train there, and its secret."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import pytest
from tests.fixtures.runs import EMBEDDED

from gemma2_grpo.commands import notebook
from gemma2_grpo.commands.notebook import changed, find_machine, show_report
from gemma2_grpo.errors import UserError
from gemma2_grpo.presets import load_config


@pytest.fixture
def no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No secret, no cache and nothing attached; what is put into the environment goes again."""
    for name in ("HF_TOKEN", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: os.environ.get("HF_TOKEN"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    yield
    os.environ.pop("HF_TOKEN", None)


def module(name: str, **content: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    return made


class FakeSecrets:
    """Kaggle's client, at the border."""

    def get_secret(self, label: str) -> str:
        if label != "HF_TOKEN":
            raise LookupError(label)
        return "hf_secret"


@pytest.mark.usefixtures("no_token")
class TestMachine:
    def test_a_cpu_trains_the_embedded_model(self) -> None:
        machine = find_machine()
        assert machine.host == "this machine" and machine.config == load_config("tiny")
        assert "choose an accelerator" in str(machine)
        assert "HF_TOKEN" not in os.environ

    def test_kaggles_secret_is_taken_and_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        client = module("kaggle_secrets", UserSecretsClient=FakeSecrets)
        monkeypatch.setitem(sys.modules, "kaggle_secrets", client)
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        machine = find_machine()
        assert os.environ["HF_TOKEN"] == "hf_secret"
        assert machine.host == "Kaggle" and "hf_secret" not in str(machine)

    def test_a_missing_secret_is_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        assert find_machine().host == "Kaggle"

    @pytest.mark.parametrize(
        ("kind", "count", "name", "mesh"),
        [
            ("tpu", 8, "gemma2-2b-v5e8", (2, 4)),
            ("tpu", 4, "gemma2-2b-v5e8", (1, 4)),
            ("tpu", 1, "gemma2-2b-v5e8", (1, 1)),
            ("gpu", 1, "gemma2-2b-gpu", (1, 1)),
            ("gpu", 2, "gemma2-2b-gpu", (1, 2)),
        ],
    )
    def test_an_accelerator_trains_the_flagship(
        self,
        kind: str,
        count: int,
        name: str,
        mesh: tuple[int, int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: kind)
        monkeypatch.setattr(jax, "local_device_count", lambda: count)
        without = find_machine()
        assert without.config_name == "tiny" and "accept its licence" in without.reason
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        machine = find_machine()
        assert machine.config_name == name
        assert machine.config.model.mesh_shape == mesh
        assert machine.config.rollout == load_config(name).rollout

    def test_an_attached_model_needs_no_token(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "input/models/google/gemma-2/transformers/gemma-2-2b-it/2"
        place.parent.mkdir(parents=True)
        place.symlink_to(EMBEDDED)
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        monkeypatch.setattr(jax, "local_device_count", lambda: 8)
        assert find_machine().config_name == "gemma2-2b-v5e8"


def test_fields_are_changed_whichever_section_they_are_in() -> None:
    config = changed(load_config("tiny"), max_steps=3, temperature=0.5)
    assert config.run.max_steps == 3 and config.rollout.temperature == 0.5
    assert changed(config, max_steps=40, temperature=1.0) == load_config("tiny")
    with pytest.raises(UserError, match="unknown field 'max_step'"):
        changed(config, max_step=3)
    with pytest.raises(UserError, match="temperature = -1 must be greater"):
        changed(config, temperature=-1)


def test_a_report_is_shown_apart_from_the_page(tmp_path: Path) -> None:
    pytest.importorskip("IPython")
    path = tmp_path / "report.html"
    path.write_text('<p title="a">5 < 6</p>')
    shown = show_report(path).data
    assert 'sandbox srcdoc="&lt;p title=&quot;a&quot;&gt;5 &lt; 6&lt;/p&gt;"' in shown


def test_every_host_with_secrets_is_known() -> None:
    assert set(notebook._SECRETS) == {"Kaggle", "Colab"}
