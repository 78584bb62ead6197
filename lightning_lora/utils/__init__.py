"""Helpers that know nothing of LoRA: names, patterns, checksums, sharded tensors, custom operators, source code that is read.

``torch_private``, ``torch_private_parallel`` and ``transformers_conventions`` wrap the private names of those libraries.

May import: torch. Nothing of this package outside this folder.
"""
