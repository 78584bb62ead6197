"""Operands for the kernels: any size, any rank, with the strides that autograd hands out; on the GPU if there is one."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The kernels serve half precision; their tiles are too large in fp32 for wide ranks. The interpreter multiplies bf16 wrongly.
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def tensor(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def strided(*shape, **kwargs):
    """The same entries as :func:`tensor`, in the middle columns of a wider tensor."""
    values = tensor(*shape, **kwargs)
    wide = torch.full((shape[0], shape[1] + 9), float("nan"), dtype=values.dtype, device=DEVICE)
    wide[:, 3:-6] = values
    return wide[:, 3:-6]


def error(mine, exact):
    """Relative, in the Frobenius norm; NaN anywhere in ``mine`` comes out as NaN, which no bound admits."""
    return ((mine.double() - exact).norm() / exact.norm()).item()
