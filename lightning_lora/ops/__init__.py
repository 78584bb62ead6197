"""Every product that an adapted layer computes: the definition, and beside it the fast way to the same numbers.

``low_rank`` and ``plain`` are the definitions. ``fused_linear`` and ``gated_mlp`` are custom operators over them, ``triton_*`` the kernels
that ``backends`` chooses on NVIDIA GPUs. Functions of tensors: no module, no config.

May import: ``utils``, ``registry``.
"""
