"""Writes one small sound file or folder of every format that can be read here."""

import functools
import importlib.util
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from jaxbn import convert

F = np.float32
NORM = {
    "weight": np.arange(3, dtype=F) + 1,
    "bias": np.arange(3, dtype=F),
    "running_mean": np.arange(3, dtype=F) / 2,
    "running_var": np.arange(3, dtype=F) + 4,
}
STATE_DICT = {f"bn.{name}": array for name, array in NORM.items()}
_NAMES = ("gamma", "beta", "moving_mean", "moving_variance")
KERAS = dict(zip(_NAMES, NORM.values(), strict=True))
LINEN = {
    "params": {"bn": {"scale": NORM["weight"], "bias": NORM["bias"]}},
    "batch_stats": {"bn": {"mean": NORM["running_mean"], "var": NORM["running_var"]}},
}


def of_npz(path):
    np.savez(path, **STATE_DICT)


def of_torch(path, legacy=False):
    import torch

    tensors = {name: torch.as_tensor(array) for name, array in STATE_DICT.items()}
    tree = {"state_dict": tensors, "best": np.float64(0.9), "epoch": 3}
    torch.save(tree, path, _use_new_zipfile_serialization=not legacy)


def of_flax(path):
    from flax.serialization import msgpack_serialize

    path.write_bytes(msgpack_serialize(LINEN))


def of_orbax(path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, LINEN)


def of_keras_2(path):
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in KERAS.items():
            file[f"model_weights/bn/bn/{name}:0"] = array


def of_keras_weights(path):
    import h5py

    with h5py.File(path, "w") as file:
        for place, array in enumerate(KERAS.values()):
            variables = file.require_group("layers/batch_normalization/vars")
            variables.create_dataset(
                str(place), data=array, compression="gzip", chunks=(3,)
            )
        variables.attrs["name"] = "bn"


def of_keras(path, config=None):
    weights = path.with_name("weights")
    of_keras_weights(weights)
    config = config or {"class_name": "BatchNormalization", "config": {"name": "bn"}}
    config["config"] |= {"axis": 1, "momentum": 0.9, "epsilon": 0.01}
    layers = {"class_name": "Functional", "config": {"layers": [config]}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(layers))
        archive.writestr("model.weights.h5", weights.read_bytes())
    weights.unlink()


def of_onnx(path, names=tuple(STATE_DICT), **options):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    arrays = zip(names, NORM.values(), strict=True)
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays]
    node = helper.make_node(
        "BatchNormalization", ["x", *names], ["y"], "norm/1", epsilon=0.01, momentum=0.8
    )
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in "xy")
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], initializers))
    onnx.save_model(model, path, **options)


def of_equinox(path):
    import equinox as eqx

    eqx.tree_serialise_leaves(path, equinox_norm())


def equinox_norm(**changes):
    import equinox as eqx

    options = {"axis_name": "batch", "mode": "batch", **changes}
    return eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, **options)


def of_tensorflow(path):
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in KERAS.items():
            tf.compat.v1.get_variable(f"bn/{name}", initializer=array)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(path / "model.ckpt"), 10)


# Each format: the package that it needs, the name of its file, and what writes it.
FORMATS = {
    "npz": ("numpy", "model.npz", of_npz),
    "safetensors": (
        "safetensors", "model.safetensors", lambda path: convert.save(path, STATE_DICT),
    ),
    "torch": ("torch", "model.pth", of_torch),
    "torch legacy": ("torch", "model.tar", lambda path: of_torch(path, legacy=True)),
    "flax": ("flax", "checkpoint_7", of_flax),
    "orbax": ("orbax", "model", of_orbax),
    "keras": ("h5py", "model.keras", of_keras),
    "keras weights": ("h5py", "model.weights.h5", of_keras_weights),
    "keras 2": ("h5py", "model.h5", of_keras_2),
    "onnx": ("onnx", "model.onnx", of_onnx),
    "equinox": ("equinox", "model.eqx", of_equinox),
    "tensorflow": ("tensorflow", "model", of_tensorflow),
}  # fmt: skip
INSTALLED = [
    name for name, (package, *_) in FORMATS.items() if importlib.util.find_spec(package)
]


def sample(name: str, folder: Path) -> Path:
    """Writes the sample of a format into a folder, and returns its path."""
    path = folder / FORMATS[name][1]
    for inner, content in _written(name).items():
        file = folder / inner
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def read(name: str, path: Path, **options) -> convert.Checkpoint:
    """Reads the sample of a format, given what the format needs."""
    like = equinox_norm() if name == "equinox" else None
    return convert.read(path, like=like, **options)


@functools.cache
def _written(name: str) -> dict[Path, bytes]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _, file, write = FORMATS[name]
        write(folder / file)
        files = [inner for inner in folder.rglob("*") if inner.is_file()]
        return {inner.relative_to(folder): inner.read_bytes() for inner in files}
