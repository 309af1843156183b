"""One table says what clouds, compilers and plans need of each kind of chip."""

import pytest

from gemma2_grpo.runtime.chips import GIB, TARGETS, find_slice, find_target, mesh_for


def test_a_slice_is_planned_with_the_numbers_of_its_family() -> None:
    v4 = find_target("v4-8")
    assert (v4.chips, v4.topology, v4.accelerator) == (4, "v4:2x2x1", "v4-8")
    assert v4.compiler_options == (("chip_config_name", "megacore"),)
    v5e = find_target("v5e-1")
    assert (v5e.chips, v5e.memory_bytes) == (1, int(15.75 * GIB))
    assert (v5e.topology, v5e.accelerator) == ("v5e:1x1", "v5litepod-1")
    assert v5e.compiler_options == (("chips_per_host_bounds", (1, 1, 1)),)
    assert v5e.link_bandwidth == 1e11
    assert {name for name in TARGETS if "-" in name} == set(
        "v5e-1 v5e-4 v5e-8 v6e-8 v4-8 v5p-8".split()
    )


def test_a_slice_has_two_names() -> None:
    assert find_slice("v5e-16") == find_slice("v5litepod-16")
    assert (find_slice("v5p-128").chips, find_slice("v5p-128").topology) == (64, "4x4x4")


@pytest.mark.parametrize(
    ("chips", "heads", "shape"),
    [(8, 4, (2, 4)), (1, 4, (1, 1)), (6, 4, (3, 2)), (3, 4, (3, 1)), (8, 1, (8, 1))],
)
def test_a_mesh_uses_all_chips(chips: int, heads: int, shape: tuple[int, int]) -> None:
    assert mesh_for(chips, heads) == shape
