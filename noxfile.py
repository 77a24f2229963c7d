"""Sessions of development: `python -m nox --list` tells them, `python -m nox` runs some."""

import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests", "docs", "package"]
# Elsewhere a session without its interpreter is skipped, and Nox says so.
nox.options.error_on_missing_interpreters = "CI" in os.environ

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
# Each interpreter with the versions of the libraries that users may have beside it.
MATRIX = [
    ("3.11", "oldest"),
    ("3.11", "newest"),
    ("3.12", "newest"),
    ("3.13", "newest"),
    ("3.14", "newest"),
]
EXTRAS_OF_USERS = (
    "flax", "optax", "equinox", "haiku", "convert", "diagnose", "progress", "examples",
)  # fmt: skip
# A few minutes of the suite.
FAST = (
    "tests/test_api.py", "tests/test_layers.py", "tests/test_errors.py",
    "tests/test_values.py", "tests/test_linen.py", "tests/test_nnx.py",
    "tests/laws/test_numerics.py", "tests/laws/test_variants.py",
    "tests/test_export.py", "tests/test_mixed_precision.py",
)  # fmt: skip


def oldest() -> list[str]:
    """Returns the lowest versions that users may have, as constraints for pip."""
    project = PROJECT["project"]
    extras = (project["optional-dependencies"].get(name, []) for name in EXTRAS_OF_USERS)
    given = itertools.chain(project["dependencies"], *extras)
    lowest = (re.fullmatch(r"([\w-]+)>=([\w.]+)", text) for text in given)
    return sorted({f"{found[1]}=={found[2]}" for found in lowest if found})


def install(session: nox.Session, versions: str) -> None:
    """Installs the project and what its tests need, in the oldest or newest versions."""
    if versions == "oldest":
        constraints = Path(session.create_tmp(), "oldest.txt")
        constraints.write_text("\n".join(oldest()) + "\n")
        session.install("-e", ".[test]", "--constraint", str(constraints))
    else:
        session.install("-e", ".[test]")
    session.run("python", "-m", "pip", "list", "--format", "freeze")


@nox.session
@nox.parametrize("python,versions", MATRIX, ids=["-".join(entry) for entry in MATRIX])
def tests(session: nox.Session, versions: str) -> None:
    """The whole default suite; arguments after `--` go to pytest."""
    install(session, versions)
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session
@nox.parametrize("python,versions", MATRIX, ids=["-".join(entry) for entry in MATRIX])
def fast(session: nox.Session, versions: str) -> None:
    """A few minutes of the suite, which another interpreter or library may break."""
    install(session, versions)
    session.run("python", "-m", "pytest", "-n", "2", *FAST, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Format and style."""
    tools = PROJECT["project"]["optional-dependencies"]["lint"]
    session.install(*(tool for tool in tools if tool.startswith("ruff")))
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")


@nox.session
def types(session: nox.Session) -> None:
    """The types of the package, of the examples, and of the file of a consumer."""
    session.install("-e", ".[lint]")
    session.run("pyright", "--pythonpath", session.virtualenv.bin + "/python")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, offline, with warnings as errors: docs/_build/html."""
    session.install("-e", ".[test]", *nox.project.dependency_groups(PROJECT, "docs"))
    build = ["-W", "--keep-going", "-b", "html", "docs", "docs/_build/html"]
    session.run("sphinx-build", *build, *session.posargs)


# What the README shows first, with nothing but jaxbn and what it depends on.
QUICK_START = """
import sys
import jax, jaxbn
bn = jaxbn.BatchNorm(momentum=0.9)
params, state = bn.init(64)
x = jax.random.normal(jax.random.key(0), (32, 8, 8, 64))
y, state = jax.jit(bn.apply, static_argnums=3)(params, state, x, True)
assert abs(float(y.mean())) < 1e-5 and abs(float(y.std()) - 1) < 1e-3
y, state = bn.apply(params, state, x, training=False)
jax.grad(lambda x: bn.apply(params, state, x, True)[0].sum())(x)
import jaxbn.tf1
for extra in ("linen", "nnx"):
    try:
        getattr(jaxbn, extra)
    except ModuleNotFoundError as error:
        assert "jaxbn[flax]" in str(error)
    else:
        raise AssertionError("flax is installed: this environment is not empty")
from importlib import metadata
assert metadata.version("jaxbn") == jaxbn.__version__
assert str(jaxbn.__file__).startswith(sys.prefix), jaxbn.__file__
print(jaxbn.__version__, "runs from", jaxbn.__file__)
"""


@nox.session
def package(session: nox.Session) -> None:
    """Builds wheel and sdist, installs each into an empty environment, and uses it."""
    session.install(*nox.project.dependency_groups(PROJECT, "package"))
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder)
        built = sorted(Path(folder).iterdir())
        session.run("twine", "check", "--strict", *map(str, built))
        session.log(f"built {', '.join(path.name for path in built)}")
        for path in built:
            empty = Path(folder, f"with {path.suffix}")
            session.run("python", "-m", "venv", str(empty))
            scripts = "Scripts" if sys.platform == "win32" else "bin"
            python = str(empty / scripts / "python")
            with session.chdir(folder):
                session.run(python, "-m", "pip", "install", "-q", str(path), external=True)
                session.run(python, "-I", "-W", "error", "-c", QUICK_START, external=True)
        if session.posargs:
            Path(session.posargs[0]).mkdir(parents=True, exist_ok=True)
            for path in built:
                Path(session.posargs[0], path.name).write_bytes(path.read_bytes())


@nox.session
def mutants(session: nox.Session) -> None:
    """Breaks the numeric core in many ways, and shows that the suite catches each."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.mutants", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """An hour of random training, resharding, checkpointing, killing and resuming."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "tests.soak", *(session.posargs or ["--minutes", "60"]))


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Times beside other libraries; arguments after `--` go to tests.benchmarks."""
    session.install("-e", ".[test,bench]")
    session.run("python", "-m", "tests.benchmarks", *session.posargs)
