"""A mutant: one defect, as a replacement of text in one file of the package."""

from pathlib import Path
from typing import NamedTuple

import jaxbn

PACKAGE = Path(jaxbn.__file__).parent


class Mutant(NamedTuple):
    """A defect, and the arguments of pytest that are likely to catch it."""

    name: str
    file: str  # in the folder jaxbn
    old: str
    new: str
    tests: str

    def broken(self) -> str:
        """Returns the text of the file with the defect; it must fit one place."""
        text = (PACKAGE / self.file).read_text()
        found = text.count(self.old)
        if found != 1:
            raise ValueError(
                f"the mutant {self.name!r} replaces text that {self.file} holds {found} "
                "times. Change its text so that it fits one place of the file."
            )
        return text.replace(self.old, self.new)


def of(file: str, *defects: tuple[str, str, str, str]) -> list[Mutant]:
    """Returns the mutants of a file, given names, old texts, new texts and tests."""
    return [Mutant(name, file, old, new, tests) for name, old, new, tests in defects]
