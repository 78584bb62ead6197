"""Helpers that know nothing of LoRA: names, patterns, checksums, atomic writes, sharded tensors, custom operators.

May import: torch. Nothing of this package outside this folder.
"""
