"""Teach Gemma 2 to show its work on maths problems, with GRPO and LoRA on Tunix."""

__version__ = "0.1.0"
