"""Whether ``pull_frozen="auto"`` pulls. Decided before a model is sharded, alike on every rank; what it rests on is tried before training.

Pulling has to be exact and no worse in memory wherever it is chosen without being asked for. So it is left out where it was not tested
(another torch, CPUs), where GPUs do not reach each other, and where replicated adapters would take much memory.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from lightning_lora.experimental import TESTED_ON_GPUS, torch_release
from lightning_lora.utils.sharding import from_all_ranks

COPIES = 4  # of each replicated number: the weight, its gradient, two moments
SHARE = 0.04  # of a GPU's memory that replicated adapters may take


def reason_against(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], device: torch.device, nodes: int) -> str | None:
    """Return why frozen weights are better gathered, None if they can be pulled. A collective.

    Args:
        model: not sharded yet.
        blocks: its repeated blocks by name, which will be units.
        device: of this rank.
        nodes: hosts of the run.
    """
    mine = next(_reasons(model, blocks, device, nodes), None)
    reasons, hosts, indices = zip(*from_all_ranks((mine, socket.gethostname(), device.index)), strict=True)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None and len(set(hosts)) > 1:
        reason = "the processes are on several hosts"
    if reason is None and (far := list(_out_of_reach(device, indices))):
        reason = f"GPU {device.index} cannot access the memory of GPU {far[0]}"
    return next((each for each in from_all_ranks(reason) if each is not None), None)


def _reasons(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], device: torch.device, nodes: int) -> Iterator[str]:
    if device.type != "cuda":
        yield f"it is for GPUs, and this is a {device.type}"
    if nodes > 1:
        yield f"it is for one host, and there are {nodes}"
    if torch_release() not in TESTED_ON_GPUS:
        yield f"on GPUs it was tested with torch {', '.join(TESTED_ON_GPUS)}, and this is {torch.__version__}"
    bare = next((name for name, block in blocks if not any(not p.requires_grad for p in block.parameters())), None)
    if bare is not None:
        yield f"nothing in {bare!r} is frozen"
    inside = {parameter for _, block in blocks for parameter in block.parameters()}
    outside = next((name for name, p in model.named_parameters() if p.requires_grad and p not in inside), None)
    if outside is not None:
        yield f"{outside!r} trains outside the blocks"
    size = COPIES * sum(parameter.nbytes for parameter in inside if parameter.requires_grad)
    if device.type == "cuda" and size > SHARE * torch.cuda.get_device_properties(device).total_memory:
        yield f"adapters whole on every GPU would take {size / 2**30:.1f} GiB with gradients and moments"


def _out_of_reach(device: torch.device, indices: Iterable[int | None]) -> Iterator[int]:
    """Yield the other ranks' GPUs that this one cannot access, as far as this process sees them."""
    visible = torch.cuda.device_count() if device.type == "cuda" else 0
    for index in indices:
        if index is not None and index != device.index and index < visible and not torch.cuda.can_device_access_peer(device, index):
            yield index
