"""Where a model's name leads: to a folder, to the hub or its cache, or nowhere, which is told before transformers tries for a minute."""

from __future__ import annotations

import difflib
import os
import re
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from lightning_lora.storage.regular_files import WrongPath

REACHED = 10.0  # seconds within which the hub has to answer
_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)


def check_there(model: str | os.PathLike[str], gguf_file: str | None = None) -> None:
    """Check that ``model`` is a model's folder, or may be a hub id. Transformers would try an unreachable hub for a minute.

    Raises:
        WrongPath: It can only be a folder and is no model's; or the folder does not exist and the hub cannot be reached.
    """
    model, path = os.fspath(model), Path(model)
    if not model:
        raise WrongPath("model='' is empty; name a folder or a hub id")
    if path.is_file():
        raise WrongPath(f"model={model!r} is a file; name its folder ({str(path.parent)!r})")
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise WrongPath(f"model={model!r} is an adapter; name the model that it was trained on, and give the adapter as adapter")
        needed = gguf_file or "config.json"
        if not (path / needed).is_file():
            raise WrongPath(f"model={model!r} is not a model: the folder has no {needed}")
        return
    beside = sorted(other.name for other in path.parent.iterdir() if other.is_dir()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, 1)
    hint = f"; did you mean {str(path.parent / close[0])!r}?" if close else ""
    if model.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2 or not _HUB_ID.fullmatch(model):
        raise WrongPath(
            f"model={model!r} is no folder (seen from {Path.cwd()}; ~ stays as it is), nor a hub id: 'name' or 'owner/name'{hint}"
        )
    reason = _unreachable(model, gguf_file or "config.json")
    if reason is not None:
        raise WrongPath(f"model={model!r} is no folder (seen from {Path.cwd()}), and the hub cannot be reached: {reason}{hint}")


def _unreachable(model: str, file: str) -> str | None:
    """Return why a model can be loaded neither from the hub nor from its cache; None if it may be."""
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(model, file), str):
        return None
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and the model is not in the cache"
    try:
        urllib.request.urlopen(f"{huggingface_hub.constants.ENDPOINT}/api/models/{model}", timeout=REACHED).close()
    except urllib.error.HTTPError:
        return None  # it answered, and will say the rest itself
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else str(reason)  # certificates may be set for the hub's library alone
    return None
