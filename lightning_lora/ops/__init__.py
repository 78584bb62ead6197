"""Every product that an adapted layer computes: its definition, and a fast version that gives the same numbers.

``low_rank`` and ``plain`` are the definitions. ``fused_linear``, ``gated_mlp`` and ``grouped_linear`` are custom operators
that compute the same. ``low_rank_sum`` stands in for a weight in a model's own code.
``float8`` defines products in FP8; ``float8_weight`` and ``frozen_linear`` use them. ``triton_*`` are the kernels that ``backends`` chooses
on NVIDIA GPUs. All are functions of tensors: they see no module and no config.

May import: ``utils``, ``registry``.
"""
