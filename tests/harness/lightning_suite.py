"""Run Lightning's own tests without and with a ``LoRACallback`` in every Trainer, and sort what fails only with it.

Packages of Lightning hold no tests. So this needs the folder ``tests`` of a checkout of its repository, at the tag of the installed
version: ``python -m tests.harness.lightning_suite --tests CHECKOUT/tests tests_pytorch/trainer tests_pytorch/models``. Without folders it
runs all of ``tests_pytorch``.

A failure is expected if its message shows that the test asserts what LoRA changes by design, or that the callback refuses the run by name.
All others are listed as ours, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: What the text of an expected failure holds → why it is expected.
EXPECTED = {
    r"training stops and writes no checkpoint": "the parameters turn NaN, which is refused",
    r"LoRACallback|LoRA froze|no layers to adapt|replaced \d+ layers|copies of this process": "refused by name",
    r"cannot be merged at the end|are in no optimizer": "refused by name",
    r"matches? no|no module|nothing to adapt": "the model has no layer that all-linear matches: refused",
    r"is a URL": "checkpoints are not read from URLs",
    r"(Missing|Unexpected) key\(s\) in state_dict|lacks \d+ tensors|has \d+ tensors that": "a checkpoint has the adapter only",
    r"'lightning_lora'|lora_[AB]|_check_model_state_dict": "asserts the exact keys of a checkpoint or a state dict",
    r"callbacks? |Callback": "asserts the exact list of callbacks",
    r"requires_grad|\.weight|\.grad\b|param_groups|_parameters": "asserts that base weights train",
    r"Compiled functions can't take variable": "torch.jit needs unload_lora first",
}


def run(tests: Path, folders: list[str], injected: bool) -> dict[str, str]:
    """Run the tests. Return the name of each that failed → its message and traceback."""
    plugin = ["-p", "tests.harness.injected"] if injected else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        path = os.pathsep.join([str(tests), str(ROOT)])
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout=300",
            f"--junitxml={report}",
            *plugin,
            *folders,
        ]
        subprocess.run(command, cwd=tests, env={**os.environ, "PYTHONPATH": path}, check=False)
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report of {tests}: see its output above.")
        return failures(xml.parse(report).getroot())


def failures(report: xml.Element) -> dict[str, str]:
    """Return the name of each failed test in a report → its message and traceback."""
    return {
        f"{case.get('classname')}.{case.get('name')}": f"{found.get('message', '')}\n{found.text or ''}"
        for case in report.iter("testcase")
        for found in (*case.findall("failure"), *case.findall("error"))
    }


def reason(text: str) -> str | None:
    """Return why a failure is expected, None if it is not. Only the lines of the error itself count."""
    said = "\n".join(line for line in text.splitlines() if line.startswith("E ")) or text
    return next((why for pattern, why in EXPECTED.items() if re.search(pattern, said)), None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="the folder tests of a checkout of Lightning's repository")
    parser.add_argument("folders", nargs="*", default=["tests_pytorch"], help="folders or files in it (%(default)s)")
    options = parser.parse_args(argv)
    before, after = (run(options.tests.resolve(), options.folders, injected) for injected in (False, True))
    only = {name: reason(text) for name, text in after.items() if name not in before}
    for name, why in sorted(only.items(), key=lambda each: (each[1] is not None, each)):
        print(f"{'OURS' if why is None else 'expected'}  {name}{'' if why is None else f': {why}'}")
    for why, count in Counter(why or "ours" for why in only.values()).most_common():
        print(f"{count:4}  {why}")
    print(
        f"{len(before)} fail without the callback, {len(only)} only with it, {sum(why is None for why in only.values())} of them are ours"
    )
    return int(None in only.values())


if __name__ == "__main__":
    sys.exit(main())
