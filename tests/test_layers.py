"""The order of the packages: each imports from those before it, and files stay small."""

import ast
import graphlib
import sys
from pathlib import Path

import jaxbn

# Lowest first. An entry of the folder jaxbn imports from earlier lines only.
ORDER = """
    _typing _compat _norm_names
    _values
    _axes _dtypes _state _sharding
    _kernels _averages _param_roles
    _statistics optim
    _layers
    _accumulation _fold
    __init__ _modules tf1
    _flax convert
    linen nnx equinox haiku
    diagnose
"""
LINES = {entry: line for line, row in enumerate(ORDER.split("\n")) for entry in row.split()}
# These may import other libraries at their top. The rest is the core.
OPTIONAL = {"convert", "diagnose", "optim", "tf1"}
OPTIONAL |= {"_flax", "linen", "nnx", "equinox", "haiku"}
CORE_IMPORTS = {"jax", "jaxbn", "numpy", *sys.stdlib_module_names}
MOST_LEVELS, MOST_IMPORTS = 9, 130
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 260, 50

ROOT = Path(jaxbn.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}
TREES = {file: ast.parse(path.read_text()) for file, path in FILES.items()}


def imports(node, lazy=True):
    """Yields the full names of what is imported below a node, in functions if `lazy`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, (
                f"line {child.lineno}: write the whole name of a module"
            )
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif lazy or not isinstance(child, ast.FunctionDef):
            yield from imports(child, lazy)


def file_of(name):
    """Returns the file of a full name such as jaxbn._state.BatchStats."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for file in (".".join(parts[1:end]), ".".join([*parts[1:end], "__init__"])):
            if file in FILES:
                return file
    raise AssertionError(f"there is no file for {name}")


OWN = {
    file: {file_of(name) for name in imports(tree) if name.split(".")[0] == "jaxbn"}
    for file, tree in TREES.items()
}


def entry_of(file):
    return file.split(".")[0]


def entries():
    """Returns, for each entry of the folder jaxbn, the others from which it imports."""
    graph = {entry_of(file): set() for file in FILES}
    for file, own in OWN.items():
        graph[entry_of(file)] |= {entry_of(other) for other in own} - {entry_of(file)}
    return graph


def test_a_package_imports_only_from_those_before_it():
    graph = entries()
    assert graph.keys() <= LINES.keys(), f"give a line to {graph.keys() - LINES.keys()}"
    for entry, own in graph.items():
        late = {other for other in own if LINES[other] >= LINES[entry]}
        assert not late, f"{entry} imports from {late}, which are not on an earlier line"


def test_no_files_import_each_other_in_a_circle():
    # The file of a package may import its own files, which never import it.
    graphlib.TopologicalSorter(OWN).prepare()


def test_there_are_few_levels_and_imports():
    graph, level = entries(), {}
    for entry in graphlib.TopologicalSorter(graph).static_order():
        level[entry] = 1 + max((level[other] for other in graph[entry]), default=0)
    assert max(level.values()) <= MOST_LEVELS, level
    # The package itself imports one of each, to export it.
    number = sum(len(own) for entry, own in graph.items() if entry != "__init__")
    assert number <= MOST_IMPORTS, f"{number} imports between entries of the folder"


def test_the_core_imports_jax_numpy_and_python_only():
    for file, tree in TREES.items():
        if entry_of(file) not in OPTIONAL:
            packages = {name.split(".")[0] for name in imports(tree, lazy=False)}
            assert packages <= CORE_IMPORTS, f"{file} imports {packages - CORE_IMPORTS}"


def test_files_tell_their_purpose_and_stay_small():
    for file, tree in TREES.items():
        first = (ast.get_docstring(tree) or "").split("\n")[0]
        assert first.endswith((".", ":")), f"{file}: say its purpose in its first line"
        lines = FILES[file].read_text().count("\n")
        assert lines <= MOST_LINES, f"{file} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = [part for part in node.body if not isinstance(part, ast.Expr)]
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= MOST_LINES_OF_A_FUNCTION, (
                    f"{file}.{node.name}: {lines} lines"
                )
