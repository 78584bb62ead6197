"""Leave out what libraries say in every run and nobody can act on: advertising, and deprecations inside them."""

from __future__ import annotations

import logging
import warnings


def quiet(command: str) -> None:
    """Silence the messages for this process, which runs one command."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{package}.utilities.rank_zero").addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
    # torchao, which transformers imports: libraries for other machines that it tries, and torch's advice to it.
    logging.getLogger("torchao").addFilter(lambda record: not record.getMessage().startswith("Failed to load"))
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant" not in record.getMessage())
    warnings.filterwarnings("ignore", r".*LeafSpec.*")  # Lightning 2.6 on torch 2.13
    warnings.filterwarnings("ignore", r"Total length of `list` across ranks is zero")  # a run without validation data
    if command != "fit":
        warnings.filterwarnings("ignore", r"The dirpath has changed")  # the checkpoint is another run's, whose best ones are of no use here
