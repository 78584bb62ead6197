"""Run Lightning's own tests with a ``LoRACallback`` in every Trainer, and what fails without it. Sort what fails only with it.

Packages of Lightning hold no tests. So this needs the folder ``tests`` of a checkout of its repository, at the tag of the installed
version: ``python -m tests.harness.lightning_suite --tests CHECKOUT/tests tests_pytorch/trainer tests_pytorch/models``. Without folders it
runs all of ``tests_pytorch``.

A failure is a refusal if a ``raise`` of our own code ended the run. Any other error from our code is ours. A test's own assertion is
expected if its error shows that it asserts what LoRA changes by design (``BY_DESIGN``). All others are listed as ours, and the exit code is
then 1. ``--reports`` keeps the tracebacks of both runs.
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
#: Where the traceback of one exception ends: "path:line: Type".
END = re.compile(r"^(\S+\.py):\d+: [\w.]+$", re.MULTILINE)
#: The same in an error that another process hands over as text.
HANDED_OVER = re.compile(r'^E\s+File "[^"]*/lightning_lora/[^"]*", line \d+, in \w+\nE\s+raise\b', re.MULTILINE)
#: A refusal where the test expects another message. pytest shows no traceback of it, but only refusals speak of LoRA.
OTHER_MESSAGE = re.compile(r"^E\s+Actual message: .*(LoRA|adapter)", re.MULTILINE)
#: What the error of a test's own assertion holds → what LoRA changes by design.
BY_DESIGN = {
    r"(Missing|Unexpected) key\(s\) in state_dict|state_dict": "a checkpoint has the adapter only",
    r"'lightning_lora'|lora_[AB]|_check_model_state_dict": "asserts the exact keys of a checkpoint or a state dict",
    r"callbacks? |Callback": "asserts the exact list of callbacks",
    r"requires_grad|\.weight|\.grad\b|param_groups|_parameters": "asserts that base weights train",
    r"LoRALinear|total_parameters|The size of tensor a \(\d+\) must match": "asserts the classes of layers or the number of parameters",
    r"Compiled functions can't take variable": "torch.jit needs unload_lora first",
}
REFUSED = "refused by name"


def run(tests: Path, folders: list[str], report: Path, *options: str) -> dict[str, str]:
    """Run the tests with more of pytest's options, and leave its report in the file ``report``. Return :func:`results` of it."""
    path = os.pathsep.join(filter(None, [str(tests), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "--timeout=300", f"--junitxml={report}", *options, *folders]
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=tests, env={**os.environ, "PYTHONPATH": path}, check=False)
    if not report.is_file():
        raise RuntimeError(f"pytest wrote no report of {tests}: see its output above.")
    return results(xml.parse(report).getroot())


def results(report: xml.Element) -> dict[str, str]:
    """Return the name of each test in a report → its message and traceback, empty if it passed. Skipped tests are left out."""
    return {
        f"{case.get('classname')}.{case.get('name')}": "\n".join(
            f"{found.get('message', '')}\n{found.text or ''}" for found in (*case.findall("failure"), *case.findall("error"))
        )
        for case in report.iter("testcase")
        if case.find("skipped") is None
    }


def reason(text: str) -> str | None:
    """Return why a failure is expected, None if it is not. ``text`` is what pytest prints of it.

    Exceptions that caused or followed one another are looked at one by one: a test that expects another error than our refusal fails by an
    assertion that follows it.
    """
    parts = re.split(r"^(?:During handling of the above|The above) exception.*$", text, flags=re.MULTILINE)
    raised = [_raised(part) for part in parts]
    if raised[-1] is False:
        return None
    if True in raised or HANDED_OVER.search(text) or OTHER_MESSAGE.search(text):
        return REFUSED
    said = "\n".join(line for line in text.splitlines() if line.startswith("E ")) or text
    return next((why for pattern, why in BY_DESIGN.items() if re.search(pattern, said)), None)


def _raised(part: str) -> bool | None:
    """Return whether a ``raise`` of our own code ends the traceback of one exception. None if it ends in other code."""
    ends = list(END.finditer(part))
    if not ends or "/lightning_lora/" not in ends[-1][1]:
        return None
    lines = [line for line in part[: ends[-1].start()].splitlines() if line.startswith(">")]
    return bool(lines) and lines[-1][1:].strip().startswith("raise")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="the folder tests of a checkout of Lightning's repository")
    parser.add_argument("--reports", type=Path, help="a folder for pytest's two reports, plain.xml and injected.xml")
    parser.add_argument("folders", nargs="*", default=["tests_pytorch"], help="folders or files in it (%(default)s)")
    options = parser.parse_args(argv)
    tests = options.tests.resolve()
    with tempfile.TemporaryDirectory() as folder:
        reports, cache = (options.reports or Path(folder)).resolve(), f"cache_dir={folder}/cache"
        reports.mkdir(parents=True, exist_ok=True)
        injected = run(tests, options.folders, reports / "injected.xml", "-o", cache, "-p", "tests.harness.injected")
        failed = {name: text for name, text in injected.items() if text}
        plain = run(tests, options.folders, reports / "plain.xml", "-o", cache, "--last-failed") if failed else {}
    only = {name: reason(text) for name, text in failed.items() if not plain.get(name)}
    for name, why in sorted(only.items(), key=lambda each: (each[1] is not None, each)):
        print(f"{'OURS' if why is None else 'expected'}  {name}{'' if why is None else f': {why}'}")
    for why, count in Counter(why or "ours" for why in only.values()).most_common():
        print(f"{count:4}  {why}")
    ours = sum(why is None for why in only.values())
    print(f"{len(injected)} tests, {len(failed)} fail with the callback, {len(only)} only with it, {ours} of them are ours")
    return int(None in only.values())


if __name__ == "__main__":
    sys.exit(main())
