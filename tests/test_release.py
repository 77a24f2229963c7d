"""What a release needs: versions that agree, mutants that fit, and a true matrix."""

import ast
import re
import shutil
import tomllib

import pytest

import jaxbn
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import PACKAGE, Mutant
from tests.tools import release

PROJECT = tomllib.loads((release.ROOT / "pyproject.toml").read_text())["project"]
FILES = "CHANGELOG.md", "CITATION.cff", "jaxbn/__init__.py"


def test_the_version_the_changelog_and_the_citation_agree(capsys):
    assert release.version_of() == jaxbn.__version__
    assert release.main([f"v{jaxbn.__version__}"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("jaxbn/__init__.py", '= "{version}"', '= "9.9.9"', "9.9.9"),
        ("CHANGELOG.md", "## {version} - ", "## Unreleased - ", "no section"),
        ("CHANGELOG.md", "## {version} - 2", "## {version} - soon 2", "no date"),
        ("CITATION.cff", "version: {version}", "version: 0.0.1", "0.0.1"),
    ],
)
def test_what_does_not_agree_is_told(file, old, new, said, tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(release.ROOT / name, tmp_path / name)
    version = jaxbn.__version__
    text = (tmp_path / file).read_text()
    assert old.format(version=version) in text
    changed = text.replace(old.format(version=version), new.format(version=version))
    (tmp_path / file).write_text(changed)
    (first, *_) = release.disagreements(f"v{version}", tmp_path)
    assert said in first
    assert release.disagreements("v0.0.0", release.ROOT)[0].startswith("the tag is v0.0.0")


def test_the_classifiers_name_the_pythons_of_the_matrix():
    text = (release.ROOT / "noxfile.py").read_text()
    matrix = set(re.findall(r'^    \("(3\.\d+)", "\w+"\),$', text, re.M))
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert set(classified) <= matrix  # of which the newest may be too new to promise
    assert PROJECT["requires-python"] == f">={min(matrix, key=lambda v: int(v[2:]))}"


def test_every_mutant_breaks_one_place_and_is_a_program():
    assert len(MUTANTS) >= 60
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert ast.dump(ast.parse(mutant.broken())) != ast.dump(
            ast.parse((PACKAGE / mutant.file).read_text())
        ), mutant.name
    stale = Mutant("stale", "_axes.py", "no such text", "", "")
    with pytest.raises(ValueError, match=r"'stale' .* _axes.py holds 0 times"):
        stale.broken()
