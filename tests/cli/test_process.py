"""The command as a process: what it imports, its exit codes, a signal from outside."""

import os
import subprocess
import sys
import time

import torch

from lightning_lora.cli.main import main
from tests.processes import ended, start


def test_the_command_line_starts_without_heavy_imports():
    code = "import sys, lightning_lora.cli.main as c; c.main(['--help']); print(sorted({'transformers', 'lightning'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def command(arguments, read=True):
    """Be the command's process, whose output someone reads, or no longer."""
    if not read:
        pipe = os.pipe()
        os.close(pipe[0])
        os.dup2(pipe[1], 1)
    sys.exit(main(arguments))


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path):
    """As `lightning-lora --help | head -1`: the code of a process that SIGPIPE ended, and not a word."""
    assert ended(start(command, ["--help"], False, said=tmp_path / "said")) == 141
    assert (tmp_path / "said").read_text() == ""


def test_sigterm_to_a_process(config, tmp_path):
    """The whole way: the signal comes from outside, the shell sees 143, and there is something to resume from."""
    arguments = ["fit", "--config", config, "--trainer.max_epochs=100000", "--trainer.limit_val_batches=0"]
    process = start(command, arguments, said=tmp_path / "said")
    deadline = time.monotonic() + 100
    while not list(tmp_path.rglob("*.ckpt")) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()  # SIGTERM
    code, error = ended(process, 60.0), (tmp_path / "said").read_text()
    assert code == 143, error
    (left,) = tmp_path.rglob("last-interrupted.ckpt")
    assert f"resume with ckpt_path={str(left)!r}" in error and "Traceback" not in error
    assert torch.load(left, weights_only=True)["global_step"] > 0
