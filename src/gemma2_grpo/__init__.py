"""Teach Gemma 2 or 3 to show its work on maths problems, with GRPO and LoRA on Tunix."""

import sys

# Here, because the modules do not even parse on an old Python.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write(f"error: Python {sys.version.split()[0]} is too old; use 3.11 or newer\n")
    sys.exit(2)

__version__ = "0.1.0"
