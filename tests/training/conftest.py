"""Programs of small models are not optimized."""

from tests.fixtures.quick import (  # noqa: F401
    pytest_runtest_setup,
    pytest_runtest_teardown,
    short_collections,
)
