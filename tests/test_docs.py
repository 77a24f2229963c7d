"""The pages: every public name on one of them, every parameter told, no dead link."""

import contextlib
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import jaxbn
from tests.tools import charts

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SITE = "https://jaxbn.readthedocs.io/en/latest/"
REPOSITORY = "https://github.com/jaxbn/jaxbn/blob/main/"
RAW = "https://raw.githubusercontent.com/jaxbn/jaxbn/main/"

# A public module is one without an underscore; what it exports is its __all__.
MODULES = ["jaxbn"] + [
    f"jaxbn.{module.name}"
    for module in pkgutil.iter_modules(jaxbn.__path__)
    if not module.name.startswith("_")
]
DIRECTIVE = re.compile(
    r"^\.\. auto(?:class|function|data|exception):: (\S+)$((?:\n| {3}.*\n)*)", re.MULTILINE
)
MEMBER = re.compile(r"^ {3}\.\. auto(?:method|property):: (\w+)$", re.MULTILINE)
# Fields that a framework adds to every module of its own.
OF_FRAMEWORKS = {"parent", "name"}


def directives():
    """Returns (page, name, shown members) for each entry of the API reference."""
    return [
        (page.name, name, MEMBER.findall(rest))
        for page in sorted(DOCS.glob("*.md"))
        for name, rest in DIRECTIVE.findall(page.read_text())
    ]


def public_names():
    """Returns all public names; where a library is missing, those of the pages."""
    names = []
    for module in MODULES:
        package = optional(module)
        exported = package.__all__ if package else ()
        names += [f"{module}.{name}" for name in exported]
        if package is None:
            names += [name for _, name, _ in directives() if name.startswith(f"{module}.")]
    return names


def optional(module):
    """Returns a module of jaxbn, or None where the library that it serves is missing."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(module)
    return None


def test_every_public_name_is_on_exactly_one_page():
    pages = {}
    for page, name, _ in directives():
        pages.setdefault(name, []).append(page)
    public = set(public_names())
    assert not (public - pages.keys()), "add them to a page docs/api_*.md"
    assert not (pages.keys() - public), "these pages tell of names that are not public"
    assert {n: p for n, p in pages.items() if len(p) > 1} == {}
    for page in {page for _, name, _ in directives() for page in pages[name]}:
        assert page.startswith("api_"), f"{page}: a name belongs to the API reference"


def told(docstring):
    """Returns the names that the sections Args and Attributes of a docstring explain."""
    names = set()
    for section in re.findall(
        r"^(?:Args|Attributes):\n((?:(?: .*)?\n)*)", docstring + "\n", re.MULTILINE
    ):
        for entry in re.findall(
            r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*)[^:\n]*: *\S", section, re.MULTILINE
        ):
            names |= {name.strip(" *") for name in entry.split(",")}
    return names


def untold(owner, package):
    """Returns the parameters of a function, or of a class, without a word.

    What takes the keywords of another function, or does as another method does, says so.
    """
    docstring = inspect.getdoc(owner) or ""
    names = told(docstring)
    for other in re.findall(r"(?:eywords of|rguments of|, as) `([\w.]+)`", docstring):
        start, _, method = other.replace("inner.", "BatchNorm.").partition(".")
        found = getattr(package, start, None) or getattr(jaxbn, start, None)
        found = getattr(found, method, None) if method else found
        names |= told(inspect.getdoc(found) or "")
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [
        name
        for name, parameter in inspect.signature(owner).parameters.items()
        if not name.startswith("_")
        and name not in names | OF_FRAMEWORKS | {"self"}
        and parameter.kind not in kinds
    ]


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_has_a_word(module):
    package = pytest.importorskip(module)
    silent = {}
    for _, full, members in directives():
        if full.rpartition(".")[0] != module:
            continue
        public = getattr(package, full.rpartition(".")[2])
        docstring = inspect.getdoc(public) or ""
        if inspect.isroutine(public) or (
            # A protocol is not called, and a layer of TensorFlow 1 is made by functions.
            inspect.isclass(public)
            and not issubclass(public, Exception)
            and not getattr(public, "_is_protocol", False)
            and "Made by" not in docstring
        ):
            silent[full] = untold(public, package)
        for member in members:
            method = getattr(public, member)
            if inspect.isroutine(method) and not getattr(public, "_is_protocol", False):
                # A method of one sentence names its parameters there.
                words = set(re.findall(r"\w+", inspect.getdoc(method) or ""))
                silent[f"{full}.{member}"] = set(untold(method, package)) - words
    assert {name: missing for name, missing in silent.items() if missing} == {}


def headings(page):
    """Returns the anchors of a page: those of its headings, and those that it names."""
    text = page.read_text()
    if page.suffix == ".md":
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    slugs = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


def links():
    """Returns (page, target) for every link in the pages and the READMEs."""
    pages = [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"), *ROOT.glob("README*.md")]
    found = []
    for page in sorted(pages):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        targets = re.findall(r"\]\(<?([^)>\s]+)>?\)", text)
        targets += re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
        found += [(page, target) for target in targets]
    return found


def destination(page, target):
    """Returns the file and the anchor of a link, or None for what is not of the project."""
    path, _, anchor = target.partition("#")
    if path.startswith(SITE):
        name = path.removeprefix(SITE).removesuffix(".html") or "index"
        notebook = DOCS / f"{name}.ipynb"
        return notebook if notebook.exists() else DOCS / f"{name}.md", anchor
    for prefix in (REPOSITORY, RAW):
        if path.startswith(prefix):
            return ROOT / path.removeprefix(prefix), anchor
    if "://" in path or path == "genindex":
        return None
    return page.parent / path if path else page, anchor


def test_no_link_is_dead():
    dead = []
    for page, target in links():
        place = destination(page, target)
        if place is None:
            continue
        file, anchor = place
        if not file.exists():
            dead.append(f"{page.name}: there is no {target}")
        elif anchor and file.suffix == ".md" and anchor not in headings(file):
            dead.append(f"{page.name}: {target} has no such heading")
    assert dead == []


def test_the_readmes_work_on_a_package_index():
    # It shows the README alone: there is no file beside it.
    for readme in ROOT.glob("README*.md"):
        relative = [target for page, target in links() if page == readme]
        assert [t for t in relative if "://" not in t and t[0] != "#"] == []


def test_a_recipe_is_short():
    blocks = re.findall(
        r"```python\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL
    )
    lines = [re.findall(r"^(?:>>>|\.\.\.) +\S.*$", block, re.MULTILINE) for block in blocks]
    assert len(blocks) > 20
    assert [block for block in lines if len(block) > 15] == []


def test_the_charts_show_what_was_recorded():
    assert charts.differences() == []
