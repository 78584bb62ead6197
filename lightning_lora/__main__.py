"""``python -m lightning_lora``: the command ``lightning-lora``, as ``torchrun -m lightning_lora fit ...`` needs it."""

import sys

from lightning_lora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
