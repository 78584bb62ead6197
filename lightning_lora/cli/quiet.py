"""Leave out what libraries say in every run and nobody can act on: advertising, and deprecations inside them."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Silence the messages for this process."""
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{package}.utilities.rank_zero").addFilter(lambda record: "Tip: For seamless" not in record.getMessage())
    warnings.filterwarnings("ignore", r".*LeafSpec.*")  # Lightning 2.6 on torch 2.13
