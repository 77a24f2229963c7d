"""A copy of the project in which one mutant at a time meets the tests."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutant import PACKAGE, Mutant

LEFT_OUT = (
    ".git",
    ".venv",
    ".nox",
    ".*_cache",
    ".hypothesis",
    "__pycache__",
    "dist",
    "_build",
)
PYTEST = sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"
PASSED, FAILED, INTERRUPTED, NO_TEST = 0, 1, 2, 5


class Outcome(NamedTuple):
    """What became of a mutant; `by` is empty where it survived."""

    mutant: Mutant
    by: str
    seconds: float


class Workshop:
    """A folder with a copy of the project, for one process of tests at a time."""

    def __init__(self, folder: Path, most_seconds: float):
        self.folder = folder / "jaxbn"
        self._most_seconds = most_seconds
        self._edits = 0
        ignored = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(PACKAGE.parent, self.folder, ignore=ignored)
        found = self._run([sys.executable, "-c", "import jaxbn; print(jaxbn.__file__)"])
        if Path(found.stdout.strip()).parent != self.folder / "jaxbn":
            raise RuntimeError(
                f"Python imports {found.stdout.strip()} and not the copy in {self.folder}, "
                "so that no mutant would be tested. Unset PYTHONPATH and PYTHONSAFEPATH."
            )

    def meet(self, mutant: Mutant, whole: bool) -> Outcome:
        """Runs the likely tests on the mutant, and with `whole` all if these pass."""
        start = time.monotonic()
        path = self.folder / "jaxbn" / mutant.file
        original = path.read_text()
        try:
            self._write(path, mutant.broken())
            by = self.failure(shlex.split(mutant.tests))
            if not by and whole:
                by = self.failure([])
        finally:
            self._write(path, original)
        return Outcome(mutant, by, time.monotonic() - start)

    def failure(self, arguments: list[str]) -> str:
        """Returns the first test that fails, or an empty text."""
        try:
            done = self._run([*PYTEST, *arguments])
        except subprocess.TimeoutExpired:
            return f"no end within {self._most_seconds:.0f} s"
        if done.returncode in (PASSED, NO_TEST):
            return ""
        if done.returncode not in (FAILED, INTERRUPTED):
            raise RuntimeError(
                f"pytest {shlex.join(arguments)} did not run: {done.stdout[-500:]}"
                f"{done.stderr[-500:]}. Check the tests that its mutant names."
            )
        found = re.search(
            r"^(?:FAILED|ERROR) ([^\s[]+(?:\[.*?\])?)(?= - |$)", done.stdout, re.M
        )
        return found[1] if found else "a crash"

    def _write(self, path: Path, text: str) -> None:
        """Writes a file with a time of its own, by which Python knows its bytecode."""
        path.write_text(text)
        self._edits += 1
        os.utime(path, (self._edits, self._edits))

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=self._most_seconds,
            check=False,
        )
