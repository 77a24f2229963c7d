"""Tells whether a tag, the version and the CHANGELOG agree: `... release v0.1.0`.

Reads files alone, so that it needs nothing installed.
"""

import re
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[2]


def version_of(root: Path = ROOT) -> str:
    """Returns the version that the package tells."""
    text = (root / "jaxbn" / "__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, re.M)[0]


def disagreements(tag: str, root: Path = ROOT) -> list[str]:
    """Returns what must be mended before the tag can be released; empty if nothing."""
    version, found = version_of(root), []
    if tag != f"v{version}":
        found.append(
            f"the tag is {tag} but jaxbn.__version__ is {version}. Tag v{version}, or set "
            "the version first."
        )
    sections = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(), re.M)
    dated = [section for section in sections if section.split(" - ")[0] == version]
    if not dated:
        found.append(
            f"CHANGELOG.md has no section for {version}, only {sections[:3]}. Write "
            f"'## {version} - {date.today():%Y-%m-%d}'."
        )
    elif not re.fullmatch(rf"{re.escape(version)} - \d{{4}}-\d\d-\d\d", dated[0]):
        found.append(
            f"CHANGELOG.md has '## {dated[0]}', which has no date. Write '## {version} - "
            f"{date.today():%Y-%m-%d}'."
        )
    cited = re.findall(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.M)
    if cited != [version]:
        found.append(f"CITATION.cff cites {cited} instead of {version}. Write {version}.")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("name one tag, such as v0.1.0", file=sys.stderr)
        return 2
    found = disagreements(arguments[0])
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print(f"{arguments[0]}: the version, the CHANGELOG and the citation agree")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
