"""A checkpoint comes back bit for bit or not at all, and training goes on as if never stopped."""

import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_grpo.config import Config
from gemma2_grpo.runtime.checkpoint import (
    clean_temporaries,
    restore_checkpoint,
    save_checkpoint,
)
from gemma2_grpo.task.examples import Example
from gemma2_grpo.training.learner import Learner

MANIFEST = "manifest.json"

# Orbax's threads go on for a moment after the test of a full disk.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(step: int) -> dict[str, Any]:
    random = np.random.default_rng(step)
    return {
        "lora": {"layers": {0: {"a": jnp.asarray(random.standard_normal((50, 40)), jnp.float32)}}},
        "optimizer": {
            "mu": jnp.asarray(random.standard_normal(300), jnp.bfloat16),
            "step": jnp.asarray(step, jnp.uint32),
            "last_finite": jnp.asarray(True),
        },
    }


def zeros() -> dict[str, Any]:
    return jax.tree.map(jnp.zeros_like, state_of(0))


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "checkpoints", step, state_of(step), keep=3)
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def largest_file(checkpoint: Path) -> Path:
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


class TestSaving:
    def test_values_and_types_come_back(self, folder: Path) -> None:
        found = restore_checkpoint(folder, zeros())
        assert found is not None and found[0] == 3
        assert_same(found[1], state_of(3))

    def test_only_the_newest_are_kept(self, tmp_path: Path) -> None:
        for step in (1, 2, 9, 10, 100):
            path = save_checkpoint(tmp_path, step, state_of(step), keep=2)
            assert path == tmp_path / f"step_{step:06d}"
        assert names(tmp_path) == ["step_000010", "step_000100"]

    def test_a_step_can_be_saved_again(self, folder: Path) -> None:
        save_checkpoint(folder, 3, state_of(33), keep=3)
        found = restore_checkpoint(folder, zeros())
        assert found is not None and found[0] == 3
        assert_same(found[1], state_of(33))

    def test_what_a_killed_process_left_is_no_checkpoint(self, folder: Path) -> None:
        shutil.copytree(folder / "step_000003", folder / ".step_000004.tmp")
        found = restore_checkpoint(folder, zeros())
        assert found is not None and found[0] == 3
        clean_temporaries(folder)
        assert names(folder) == ["step_000001", "step_000002", "step_000003"]
        (folder / ".step_000004.tmp").mkdir()
        (folder / ".step_000004.tmp" / "rest").write_text("of an earlier attempt")
        save_checkpoint(folder, 4, state_of(4), keep=3)
        assert names(folder) == ["step_000002", "step_000003", "step_000004"]
        assert not (folder / "step_000004" / "rest").exists()

    def test_a_disk_that_is_full_leaves_the_others(self, folder: Path) -> None:
        """Orbax's own save returns True, and the error comes later if it is asked for."""
        large = state_of(4)
        large["lora"]["layers"][0]["a"] = jnp.asarray(
            np.random.default_rng(0).standard_normal((500, 400)), jnp.float32
        )
        with file_size_limit(100_000), pytest.raises(OSError, match=r"^checkpoint of step 4 could"):
            save_checkpoint(folder, 4, large, keep=3)
        assert names(folder) == ["step_000001", "step_000002", "step_000003"]
        found = restore_checkpoint(folder, zeros())
        assert found is not None and found[0] == 3

    def test_shards_come_back_where_they_were(self, wide_mesh: Mesh, tmp_path: Path) -> None:
        sharding = NamedSharding(wide_mesh, PartitionSpec("tp", "fsdp"))
        values = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
        state = {"a": jax.device_put(values, sharding)}
        save_checkpoint(tmp_path, 1, state, keep=1)
        found = restore_checkpoint(tmp_path, jax.tree.map(jnp.zeros_like, state))
        assert found is not None
        assert found[1]["a"].sharding == sharding
        np.testing.assert_array_equal(found[1]["a"], values)


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Writing beyond the limit fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def flip_a_bit(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    path.write_bytes(path.read_bytes()[:-1])


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(checkpoint: Path) -> None:
        content = json.loads((checkpoint / MANIFEST).read_text()) | changes
        kept = {name: value for name, value in content.items() if value is not None}
        (checkpoint / MANIFEST).write_text(json.dumps(kept))

    return edit


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip_a_bit,
    "a file cut short": truncate,
    "a missing file": lambda checkpoint: largest_file(checkpoint).unlink(),
    "no manifest": lambda checkpoint: (checkpoint / MANIFEST).unlink(),
    "an empty manifest": lambda checkpoint: (checkpoint / MANIFEST).write_text(""),
    "another kind of manifest": lambda checkpoint: (checkpoint / MANIFEST).write_text("[1]"),
    "a manifest without hashes": edit_manifest(sha256=None),
    "hashes of another kind": edit_manifest(sha256=[1]),
    "a manifest without its step": edit_manifest(step=None),
    "an empty directory": empty,
    "a file in its place": lambda checkpoint: (
        shutil.rmtree(checkpoint),
        checkpoint.write_text("x"),
    ),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
    def test_the_last_good_one_is_restored(
        self, damage: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        damage(folder / "step_000003")
        with caplog.at_level(logging.WARNING):
            found = restore_checkpoint(folder, zeros())
        assert found is not None and found[0] == 2
        assert_same(found[1], state_of(2))
        (warning,) = [r for r in caplog.records if r.name.startswith("gemma2_grpo")]
        assert warning.getMessage().startswith(f"checkpoint {folder / 'step_000003'} is damaged (")
        assert warning.getMessage().endswith("); falling back")

    def test_a_renamed_directory_is_not_taken_for_another_step(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (folder / "step_000002").rename(folder / "step_000007")
        with caplog.at_level(logging.WARNING):
            found = restore_checkpoint(folder, zeros())
        assert found is not None and found[0] == 3
        assert "its manifest is of step 2" in caplog.text

    def test_what_was_passed_over_is_cleared_away(self, folder: Path) -> None:
        """Else it would be the newest one still when the resumed run is stopped again."""
        (folder / "step_000002").rename(folder / "step_000007")
        save_checkpoint(folder, 4, state_of(4), keep=2)
        assert names(folder) == ["step_000003", "step_000004"]

    def test_all_damaged_is_an_error(self, folder: Path) -> None:
        for path in folder.iterdir():
            flip_a_bit(path)
        with pytest.raises(OSError, match="none of the checkpoints verifies") as caught:
            restore_checkpoint(folder, zeros())
        assert str(caught.value) == (
            f"{folder}: none of the checkpoints verifies; start a new run directory"
        )

    def test_none_is_none(self, tmp_path: Path) -> None:
        assert restore_checkpoint(tmp_path, zeros()) is None
        assert restore_checkpoint(tmp_path / "absent", zeros()) is None
        (tmp_path / "step_latest").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        assert restore_checkpoint(tmp_path, zeros()) is None
        save_checkpoint(tmp_path, 1, state_of(1), keep=1)
        assert names(tmp_path) == ["notes.txt", "step_000001", "step_latest"]


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_resumed_run_is_a_straight_run(
    iterations: int,
    make_learner: Callable[..., Learner],
    config: Config,
    changed: Callable[..., Config],
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """Tunix skips prompts when it resumes with more than one iteration per batch; its final
    weights then differ from those of a straight run.
    """
    config = changed(config, num_iterations=iterations, max_steps=4, warmup_fraction=0.5)

    def score(examples: Any, texts: list[str], _: Any) -> dict[str, np.ndarray]:
        del examples
        return {"total": np.array([sum(map(ord, text)) % 97 / 97 for text in texts])}

    def steps(learner: Learner, numbers: range) -> list[Any]:
        results = [learner.step(n, examples[2 * n : 2 * n + 2], score) for n in numbers]
        return [(r.completions.texts, r.updates, r.learning_rate) for r in results]

    straight = make_learner(config)
    steps(straight, range(2))
    save_checkpoint(tmp_path, 2, straight.state(), keep=2)
    before = jax.device_get(straight.state())
    expected = steps(straight, range(2, 4))
    assert all(len(updates) == iterations for _, updates, _ in expected)

    resumed = make_learner(config)
    assert not np.array_equal(
        jax.tree.leaves(resumed.state()["lora"])[0], jax.tree.leaves(before["lora"])[0]
    )
    found = restore_checkpoint(tmp_path, resumed.state())
    assert found is not None and found[0] == 2
    resumed.set_state(found[1])
    assert_same(jax.device_get(resumed.state()), before)
    assert steps(resumed, range(2, 4)) == expected
    assert_same(jax.device_get(resumed.state()), jax.device_get(straight.state()))
