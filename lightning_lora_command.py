"""The console script ``lightning-lora``. It prints help and version without importing the package, because that imports torch.

It stands beside the package for that reason: importing a module of a package imports the package first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Run one command and return its exit code (see `lightning_lora.cli.main`)."""
    package = importlib.util.find_spec("lightning_lora")
    assert package is not None and package.submodule_search_locations
    spec = importlib.util.spec_from_file_location("lightning_lora_help", Path(package.submodule_search_locations[0], "cli", "help.py"))
    assert spec is not None and spec.loader is not None
    texts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(texts)
    code = texts.run(sys.argv[1:])
    if code is not None:
        return int(code)
    from lightning_lora.cli.main import main as run_command

    return run_command()


if __name__ == "__main__":
    sys.exit(main())
