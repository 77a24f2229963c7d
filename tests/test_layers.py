"""The layers of the house: a room imports only from rooms above it, and stays small."""

import ast
from pathlib import Path

import jaxbn

LAYERS = (
    {"_typing"},
    {"_axes", "_axis_groups", "_dtypes", "_double", "_state", "_placement"},
    {"_isolation", "_transpose", "_weights"},
    {"_tiles"},
    {"_affine_tangent", "_variance"},
    {"_affine_map"},
    {"_moments", "_normalize"},
    {"_groups", "_renorm_limits", "_running", "_sync"},
    {"_view"},
    {"_normalizer"},
    {"_apply"},
    {"_batch_norm"},
    {"_dropout", "_ema", "_functions", "_renorm"},
    {"_ghost", "_replicas"},
    {"_gathered", "_kernel_layout", "_pool"},
    {"_gather", "_population"},
    {"_affine"},
    {"_fold", "_fold_check", "_fold_names"},
    {"_fold_tree"},
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
    {
        "convert._ema_norm",
        "convert._debias",
        "convert._npz",
        "convert._safetensors",
        "convert._torch_file",
    },
    {"convert._dialect", "convert._files"},
    {"convert._values"},
    {"convert._converted"},
    {"convert._found", "convert._tensorflow"},
    {
        "convert._equinox_state",
        "convert._flax",
        "convert._haiku",
        "convert._keras",
        "convert._tf1",
        "convert._torch",
    },
    {"convert._equinox"},
    {"convert.__init__"},
    {"_model_average", "_roles"},
    {"diagnose._files", "diagnose._layers", "diagnose._report"},
    {"diagnose._probe", "diagnose._values"},
    {"diagnose._drift"},
    {"diagnose._diagnose"},
    {"diagnose.__init__", "diagnose.__main__"},
    {"optim"},
    {"__init__"},
    {"_flax_call", "_flax_gather", "_flax_restore"},
    {"_linen_folded", "_linen_population", "_linen_stats", "_linen_train"},
    {"_nnx_norm", "_nnx_train"},
    {"_linen_norm", "_nnx_fold", "_nnx_population"},
    {"linen", "nnx"},
)
STANDARD = {
    "collections",
    "contextlib",
    "re",
    "types",
    "dataclasses",
    "functools",
    "itertools",
    "math",
    "operator",
    "os",
    "typing",
    "warnings",
}
# The packages that a room may import besides jax and the standard library.
PACKAGES = {
    room: {"numpy"}
    for room in ("_affine", "_fold_check", "_normalizer", "_pool", "_replicas")
}
PACKAGES["__init__"] = {"lazy_loader"}
PACKAGES["_population"] = {"tqdm"}
LINEN = ("_linen_folded", "_linen_norm", "_linen_population", "_linen_stats")
LINEN += ("_linen_train", "linen")
NNX = ("_nnx_fold", "_nnx_norm", "_nnx_population", "_nnx_train", "nnx")
for room in ("_flax_call", "_flax_gather", "_flax_restore", *LINEN, *NNX):
    PACKAGES[room] = {"flax", "optax"} if room.endswith("_train") else {"flax"}
ROOT = Path(jaxbn.__file__).parent
ROOMS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
}
# Files are read by packages that are imported where they are used.
FILES = {"contextlib", "io", "json", "os", "pathlib", "pickle", "secrets"}
FILES |= {"numpy", "safetensors", "torch", "zipfile"}
PACKAGES |= {room: FILES for room in ROOMS if room.startswith("convert.")}
PACKAGES["optim"] = {"optax"}
PACKAGES |= {f"diagnose.{room}": {"numpy"} for room in ("_drift", "_layers", "_probe")}
PACKAGES["diagnose._values"] = {"numpy"}
PACKAGES["diagnose._files"] = {"numpy", "orbax", "os", "pathlib"}
PACKAGES["diagnose._report"] = {"matplotlib", "os"}
PACKAGES["diagnose.__main__"] = {"argparse", "sys"}
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
