"""Helpers that know nothing of LoRA: names, patterns, checksums, atomic writes, sharded tensors, custom operators.

``torch_private`` and ``transformers_conventions`` wrap the private names of those libraries.

May import: torch. Nothing of this package outside this folder.
"""
