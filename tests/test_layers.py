"""The layers of the house: a room imports only from rooms above it, and stays small."""

import ast
from pathlib import Path

import jaxbn

LAYERS = (
    {"_typing"},
    {"_axes", "_dtypes", "_double", "_state", "_placement"},
    {"_weights"},
    {"_moments", "_normalize"},
    {"_groups", "_renorm_limits", "_running", "_sync"},
    {"_normalizer"},
    {"_apply"},
    {"_batch_norm"},
    {"_dropout", "_ema", "_functions", "_renorm"},
    {"_ghost", "_replicas"},
    {"tf1._arguments", "tf1._axes", "tf1._paths", "tf1._variables"},
    {
        "tf1._dropout",
        "tf1._form",
        "tf1._moments",
        "tf1._moving_averages",
        "tf1._normalization",
    },
    {"tf1._layer"},
    {"tf1._batch_norm", "tf1._batch_normalization"},
    {"tf1.__init__"},
    {"__init__"},
    {"_flax_call", "_flax_restore"},
    {"_linen_stats", "_linen_train", "_nnx_norm", "_nnx_train"},
    {"_linen_norm"},
    {"linen", "nnx"},
)
STANDARD = {
    "collections",
    "types",
    "dataclasses",
    "functools",
    "math",
    "operator",
    "typing",
    "warnings",
}
# The packages that a room may import besides jax and the standard library.
PACKAGES = {"_normalizer": {"numpy"}, "_replicas": {"numpy"}}
LINEN = ("_linen_norm", "_linen_stats", "_linen_train", "linen")
NNX = ("_nnx_norm", "_nnx_train", "nnx")
for room in ("_flax_call", "_flax_restore", *LINEN, *NNX):
    PACKAGES[room] = {"flax", "optax"} if room.endswith("_train") else {"flax"}
ROOT = Path(jaxbn.__file__).parent
ROOMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
}
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
        own = {name[len("jaxbn.") :] for name in imports(path) if name.startswith("jaxbn.")}
        assert own <= ABOVE[room], f"{room} imports {own - ABOVE[room]}"


def test_the_core_imports_jax_and_nothing_else():
    for room, path in ROOMS.items():
        packages = {name.split(".")[0] for name in imports(path)} - STANDARD
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
