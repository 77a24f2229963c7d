"""The layers of the house: a room imports only from rooms above it, and stays small."""

import ast
from pathlib import Path

import jaxbn

LAYERS = (
    {"_typing"},
    {"_axes", "_dtypes", "_double", "_state", "_vma"},
    {"_weights"},
    {"_moments", "_normalize"},
    {"_sync"},
    {"_groups", "_renorm_limits", "_running"},
    {"_normalizer"},
    {"_apply"},
    {"_batch_norm"},
    {"_dropout", "_ema", "_functions", "_renorm"},
    {"_ghost"},
    {"__init__"},
)
# The room that may import a package besides jax and the standard library.
PACKAGES = {"_normalizer": {"numpy"}}
ROOMS = {path.stem: path for path in Path(jaxbn.__file__).parent.glob("*.py")}
ABOVE = {room: set().union(*LAYERS[:i]) for i, layer in enumerate(LAYERS) for room in layer}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_every_room_has_a_layer():
    assert set(ROOMS) == set(ABOVE)


def test_no_room_imports_from_below_or_beside():
    for room, path in ROOMS.items():
        own = {name.split(".")[1] for name in imports(path) if name.startswith("jaxbn.")}
        assert own <= ABOVE[room], f"{room} imports {own - ABOVE[room]}"


def test_the_core_imports_jax_and_nothing_else():
    standard = {"collections", "dataclasses", "functools", "math", "operator", "typing"}
    for room, path in ROOMS.items():
        packages = {name.split(".")[0] for name in imports(path)} - standard
        assert packages <= {"jax", "jaxbn", *PACKAGES.get(room, ())}, room


def test_rooms_and_functions_stay_small():
    for room, path in ROOMS.items():
        text = path.read_text()
        assert text.count("\n") <= 260, f"{room} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = [n for n in node.body if not isinstance(n, ast.Expr)]
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 50, f"{room}.{node.name} has {lines} lines"
