"""Identify the base that an adapter belongs to by a cheap content hash of the frozen weights.

Elsewhere an adapter loads on a base it was not trained on without an error, and its outputs are wrong. The hash reads 1,024 entries of each
frozen tensor, so it takes a fraction of a second. It tells other models and other revisions apart, but not a change of few entries;
:func:`~lightning_lora.utils.checksums.sampled_digest` says how likely. Entries are rounded to bf16, so the same checkpoint loaded in fp32
or bf16 has the same hash. In float16 it may have another, because rounding twice is not rounding once. Of a sharded base only these entries
are gathered, so the hash is the same under every strategy and as fast.

A copy that was quantized here has the same hash too: its layers store the digest of their unpacked weights. For a base that was loaded
quantized, only the parameters that are not quantized (embeddings, norms, biases) are compared, with a warning.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.base import PREFIX, LoRALayer, lora_layers
from lightning_lora.layers.several_weights import SeveralWeights
from lightning_lora.model.noted_state import base_buffers
from lightning_lora.quantization.content import UNKNOWN, digest_or_weight, packed_digest
from lightning_lora.quantization.formats import format_of, single
from lightning_lora.registry import belongs_to_packed_base, kind_of
from lightning_lora.utils.checksums import sampled_digests
from lightning_lora.utils.names import bare, clean_name, join
from lightning_lora.utils.pieces import Piece, flattened_pieces, piece_of
from lightning_lora.utils.sharding import is_flattened
from lightning_lora.utils.torch_private_parallel import fsdp1_flattened, fsdp2_original
from lightning_lora.utils.transformers_conventions import model_name

HALF, QUANTIZED = 16, "q"
PACKED = "packed"  # key of :func:`packed_identity` in a base's identity
BUFFERS = "buffers"  # key of :func:`buffer_digests` in it
LINEAR_MARK = "@"  # stands before the names of weights that can be quantized, of linears and experts, in :func:`base_digests`
LINEAR = nn.Linear  # read at import: Lightning's plugins replace `nn.Linear` by their own class while a model is built


class OtherBase(ValueError):
    """An adapter was trained on another base, or on this one in another dtype that rounds otherwise: float16."""


def base_identity(root: nn.Module, exclude: Collection[str] = (), rows: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Any]:
    """Return the base's identity as an adapter file stores it: ``{"fingerprint", "class", "name"}``, plain strings.

    The first half of the fingerprint covers everything but the weights of linear layers and experts. The second half covers those weights;
    it begins with "q" if some of them were loaded quantized.

    Args:
        root: the module that names are relative to, adapted or not, merged or not.
        exclude: names of base tensors that were trained, and so are no part of the base.
        rows: name of a weight → its rows that are no part of the base. Default: those that adapted layers have.
    """
    return identity_of(root, base_digests(root, rows), exclude)


def is_readable(root: nn.Module) -> bool:
    """False if an FSDP1 unit around the root has flattened some of its parameters. Their shapes and places are known to that unit only."""
    flat = flattened_pieces(root) if is_flattened(root) else {}
    inside = ((module, name, p) for module in root.modules() for name, p in module.named_parameters(recurse=False))
    return not any(fsdp1_flattened(p) and (module, name) not in flat for module, name, p in inside)


def base_digests(root: nn.Module, rows: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, str]:
    """Name → sampled digest of each base tensor, in the order of a fingerprint; a collective under sharding.

    Rows that train are left out: a resized vocabulary has other random values there in every process.
    What is on the meta device has no content yet and is left out. Names that begin with ``@`` are weights of linear layers and experts.
    """
    contents: dict[str, str | Tensor | Piece] = {}
    flat = flattened_pieces(root) if is_flattened(root) else {}
    for module_name, module in sorted(root.named_modules(remove_duplicate=False)):
        packing = format_of(module)
        scales = () if packing is None else packing.attributes  # the weight's own digest covers them
        for name, parameter in sorted(module.named_parameters(recurse=False, remove_duplicate=False)):
            full = clean_name(join(module_name, name))
            if not name.startswith(PREFIX) and not parameter.is_meta and name not in scales:
                packs = (name == "weight" and isinstance(module, LINEAR)) or name in _stacks(module)
                key = LINEAR_MARK + full if packs else full
                contents[key] = _content(module, name, flat.get((module, name), parameter), None if rows is None else rows.get(full, ()))
    sampled = [key for key, content in contents.items() if not isinstance(content, str)]
    digests = dict(zip(sampled, sampled_digests([contents[key] for key in sampled]), strict=True))  # type: ignore[misc]
    return {key: content if isinstance(content, str) else digests[key] for key, content in contents.items()}


def identity_of(root: nn.Module, digests: Mapping[str, str], exclude: Collection[str] = ()) -> dict[str, Any]:
    """:func:`base_identity` from digests that were taken before, as :func:`base_digests` has them."""
    rest, linear, mark = hashlib.sha256(), hashlib.sha256(), ""
    for key, value in digests.items():
        full = key.removeprefix(LINEAR_MARK)
        if full not in exclude:
            mark = QUANTIZED if value.startswith(UNKNOWN) else mark
            (linear if key != full else rest).update(f"{full}={value};".encode())
    config = getattr(root, "config", None)
    fingerprint = rest.hexdigest()[:HALF] + (mark + linear.hexdigest())[:HALF]
    identity = {"fingerprint": fingerprint, "class": fsdp2_original(type(bare(root))).__name__, "name": model_name(config)}
    belongs = any(belongs_to_packed_base(layer.lora_config.init) for _, layer in lora_layers(root))
    return identity | ({PACKED: packed_identity(root)} if belongs else {})


def identity_like(
    saved: dict[str, Any], root: nn.Module, exclude: Collection[str] = (), rows: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """Return :func:`base_identity`, with all that a saved identity has."""
    return base_identity(root, exclude, rows) | ({PACKED: packed_identity(root)} if PACKED in saved else {})


def buffer_digests(root: nn.Module, exclude: Collection[str] = ()) -> dict[str, dict[str, str]]:
    """Return ``{"buffers": name → sampled digest}`` of the base's persistent buffers, or nothing if there are none.

    A fingerprint does not cover buffers. But statistics of the data that a user puts into a buffer before training are no longer there in a
    new process.
    """
    buffers = {name: buffer for name, buffer in base_buffers(root, moved=False).items() if name not in exclude}
    return {BUFFERS: dict(zip(buffers, sampled_digests([*buffers.values()]), strict=True))} if buffers else {}


def packed_identity(root: nn.Module) -> str:
    """Return formats and a hash of all quantized weights as they are stored: of the base that an adapter with LoftQ belongs to."""
    digests = {clean_name(name): digest for name, module in sorted(root.named_modules()) if (digest := packed_digest(module)) is not None}
    formats = {digest.partition("=")[0] for digest in digests.values()}
    content = "".join(f"{name}={digest};" for name, digest in digests.items())
    return f"{', '.join(sorted(formats))} {hashlib.sha256(content.encode()).hexdigest()[:HALF]}" if digests else "not quantized"


def same_base(mine: dict[str, Any], other: dict[str, Any]) -> bool | None:
    """Return whether two :func:`base_identity` are of one base. None: as far as it can be compared, for one of the two came quantized."""
    one, two = mine["fingerprint"], other["fingerprint"]
    if one != two and QUANTIZED in one[HALF:] + two[HALF:] and one[:HALF] == two[:HALF]:
        return None
    return bool(one == two)


def check_base(mine: dict[str, Any], saved: dict[str, Any], where: str) -> None:
    """Compare this base with the one stored in an adapter file.

    Args:
        mine: this model's :func:`base_identity`.
        saved: the file's.
        where: the file's path, for messages.

    Raises:
        OtherBase: they differ. The message has both hashes and says how to load anyway.
    """
    if PACKED in saved and mine.get(PACKED) != saved[PACKED]:
        raise OtherBase(
            f"{where} was trained with LoftQ, so it belongs to quantized weights: {saved[PACKED]}; this model's are {mine.get(PACKED)}."
            " Quantize the base as it was then, with quantize_base(model, how, lora=config) and the same config, or pass check_base=False"
            " to use the adapter here anyway."
        )
    same = same_base(mine, saved)
    if same is None:
        warnings.warn(
            f"{where}: one of the two bases came quantized, so only what is not packed (embeddings, norms, biases) could be compared; that"
            " is the same.",
            stacklevel=3,
        )
    elif not same:
        raise OtherBase(
            f"{where} was trained on another base: fingerprint {saved['fingerprint']} ({saved['class']} {saved['name']!r}), this model has"
            f" {mine['fingerprint']} ({mine['class']} {mine['name']!r}). Load that base (in float16 if it was then, not if not; one that is"
            " drawn at random, from the same seed), or pass check_base=False to use the adapter here anyway."
        )


def check_buffers(root: nn.Module, saved: dict[str, Any], present: Collection[str], where: str) -> None:
    """Compare this base's buffers with the digests stored in an adapter file.

    Args:
        root: the module to load into.
        saved: the file's identity of its base.
        present: names of the tensors that the file holds itself.
        where: the file's path, for messages.

    Raises:
        OtherBase: one differs. The message names it.
    """
    buffers = base_buffers(root, moved=False) | base_buffers(root, moved=True)
    names = [name for name in saved.get(BUFFERS, ()) if name in buffers and name not in present]
    digests = sampled_digests([buffers[name] for name in names])
    other = [name for name, digest in zip(names, digests, strict=True) if digest != saved[BUFFERS][name]]
    if other:
        raise OtherBase(
            f"{where}: the buffer {other[0]!r} had other values where the adapter was trained ({len(other)} of {len(names)} buffers did):"
            " set it as it was then, load a checkpoint of LoRACallback, which holds buffers, or pass check_base=False to keep this model's."
        )


def _content(module: nn.Module, name: str, content: nn.Parameter | Piece, rows: tuple[int, ...] | None) -> str | Tensor | Piece:
    """Return a base tensor's digest, or what it is to be computed from."""
    if isinstance(module, LoRALayer) and (base := module.base_beside(name)) is not None:
        return base
    if isinstance(module, LoRALayer) and name in module.adapted:
        layer = module.by_weight()[name]
        if layer.base_weight_digest:
            return layer.base_weight_digest
        module, name, rows = layer, "weight", layer.replaced_rows if rows is None else rows
    if rows:
        return replace(content, without=rows) if isinstance(content, Piece) else piece_of(content, rows)
    layer = None if isinstance(content, Piece) else single(module, name)
    return content if layer is None else digest_or_weight(layer)


def _stacks(module: nn.Module) -> Collection[str]:
    """Return the names of a module's weights that are stacks of matrices, such as experts."""
    kind = kind_of(type(module))
    return kind.stacks(type(module)) if kind is not None and issubclass(kind, SeveralWeights) else ()
