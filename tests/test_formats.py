"""Checkpoints of every format: told by content, read as they were written, or refused."""

import gc
import gzip
import pickle
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import convert
from jaxbn.diagnose.__main__ import main
from tests.tools import sample_files as samples
from tests.tools.hostile_files import KINDS, Payload, outcome
from tests.tools.sample_files import FORMATS, KERAS, LINEN, NORM, STATE_DICT, F, sample

FIND = {
    "flax": convert.find_flax,
    "orbax": convert.find_flax,
    "keras": convert.find_keras,
    "tensorflow": convert.find_tf1,
    "equinox": convert.find_equinox,
}


def the_norm(name, arrays):
    """Returns the one batch norm of a sample."""
    (layer,) = FIND.get(name.split()[0], convert.find_torch)(arrays).layers.values()
    return layer


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_told_by_its_content(name, tmp_path, capsys):
    pytest.importorskip(FORMATS[name][0])
    path = sample(name, tmp_path)
    if path.is_file():
        path = path.rename(path.with_name("of_another.json"))
    checkpoint = samples.read(name, path)
    layer = the_norm(name, checkpoint.arrays)
    if name == "equinox":  # a new one
        np.testing.assert_array_equal(layer.params.scale, 1)
        return
    got = (*layer.params, layer.state.mean, layer.state.var)
    for array, want in zip(got, NORM.values(), strict=True):
        np.testing.assert_array_equal(array, want)
    assert str(checkpoint).startswith(f"{checkpoint.path}: {checkpoint.format}, 4 arrays")
    if name == "keras":
        (settings,) = checkpoint.settings.values()
        assert settings == {"axis": 1, "momentum": 0.9, "epsilon": 0.01}
    if name == "onnx":
        assert checkpoint.settings == {"bn": {"eps": 0.01, "momentum": 0.2}}
    assert main([str(path)]) == 0
    assert str(checkpoint) in capsys.readouterr().out


# What a file may be instead of a checkpoint, and what its owner is told.
NOT_READ = {
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>", "download failed"),
    "gzip": (gzip.compress(b"arrays"), "gunzip"),
    "a pickle": (pickle.dumps({"a": 1}), "may run anything.*Where you trust it"),
    "npy": (b"\x93NUMPY\x01\x00", r"no names.*like=\(model, state\)"),
    "text": (b"hello", r"no known format, expected one of .*\.keras.*\.onnx.*\.pth"),
    "nothing": (b"", "no known format"),
    "an old TensorFlow": (bytes(40) + bytes.fromhex("57fb808b247547db"), "np.savez"),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_what_is_no_checkpoint_gets_its_remedy(kind, tmp_path):
    content, remedy = NOT_READ[kind]
    path = tmp_path / "model"
    path.write_bytes(content)
    with pytest.raises(convert.CheckpointError, match=remedy) as caught:
        convert.read(path)
    assert str(path) in str(caught.value)


def test_a_checkpoint_of_tensorflow_has_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "model.ckpt-9.index").touch()
    for path in (tmp_path, tmp_path / "model.ckpt-9", tmp_path / "model.ckpt-9.index"):
        with pytest.raises(ImportError, match=r"ckpt-9 .*np\.savez"):
            convert.load(path)
    (tmp_path / "saved_model.pb").touch()
    with pytest.raises(convert.CheckpointError, match=r"program.*variables\.index"):
        convert.load(tmp_path / "saved_model.pb")


def test_torchscript_is_refused_with_the_safe_way(tmp_path):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.BatchNorm1d(3)).save(tmp_path / "model.pt")
    with pytest.raises(
        convert.CheckpointError, match=r"TorchScript.*state_dict\(\)"
    ) as caught:
        convert.load(tmp_path / "model.pt")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_values_beside_tensors_run_nothing_and_are_listed(legacy, tmp_path):
    torch = pytest.importorskip("torch")
    import argparse

    tree = {
        "state_dict": {"bn.weight": torch.ones(3)},
        "history": np.arange(6, dtype=">f8").reshape(2, 3).T,
        "best": np.float64(0.9),
        "args": argparse.Namespace(lr=0.1, path=Path("model")),
        "names": np.array(["a"]),
        "epoch": 3,
    }
    torch.save(tree, tmp_path / "m.th", _use_new_zipfile_serialization=not legacy)
    found = convert.read(tmp_path / "m.th")
    assert list(found.arrays) == ["state_dict.bn.weight", "history"]
    np.testing.assert_array_equal(found.arrays["history"], tree["history"])
    assert list(found.left_out) == ["best", "args", "names"]
    tree["more"] = Payload(tmp_path / "made")
    torch.save(tree, tmp_path / "m.th", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(convert.CheckpointError, match=r"more than tensors \(\w*\.open\)"):
        convert.read(tmp_path / "m.th")
    assert not (tmp_path / "made").exists()


def test_the_newest_step_of_orbax_counts(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
        for step in (1, 2, 10):
            tree = {**LINEN, "step": np.int64(step), "text": np.zeros(1, F)}
            checkpointer.save(tmp_path / f"run-{step}", tree)
    found = convert.read(tmp_path)
    assert (found.path, found.arrays["step"]) == (tmp_path / "run-10", 10)
    assert "run-10 is the newest of 3 checkpoints" in str(found)
    (tmp_path / "run-2").rename(tmp_path / "best_10")
    with pytest.raises(convert.CheckpointError, match="best_10, run-10"):
        convert.read(tmp_path)
    assert convert.read(tmp_path / "best_10").arrays["step"] == 2
    options = ocp.CheckpointManagerOptions(step_prefix="step", step_format_fixed_length=6)
    with ocp.CheckpointManager(tmp_path / "many", options=options) as manager:
        items = {name: ocp.args.StandardSave(part) for name, part in LINEN.items()}
        manager.save(
            5, args=ocp.args.Composite(**items, config=ocp.args.JsonSave({"a": 1}))
        )
    found = convert.read(tmp_path / "many")
    assert found.path.name == "step_000005"
    np.testing.assert_array_equal(
        the_norm("flax", found.arrays).state.var, NORM["running_var"]
    )


def test_files_of_flax_are_read_by_number(tmp_path):
    serialization = pytest.importorskip("flax.serialization")
    for step in (2, 10):
        tree = {"model": LINEN, "step": np.int32(step), "name": "run"}
        content = serialization.msgpack_serialize(tree)
        (tmp_path / f"checkpoint_{step}").write_bytes(content)
    found = convert.read(tmp_path)
    assert found.arrays["step"] == 10
    assert list(convert.find_flax(found.arrays).layers) == ["bn"]
    two = {"model": LINEN, "ema": LINEN}
    with pytest.raises(ValueError, match=r"several batch_stats.*'ema/', 'model/'"):
        convert.find_flax(two)


def h5(path, **arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return h5py.File(path, "a")


def test_variables_of_keras_are_named_by_the_config(tmp_path):
    pytest.importorskip("h5py")
    config = {"name": "bn", "scale": False, "renorm": False}
    path = tmp_path / "model.keras"
    samples.of_keras(path, {"class_name": "BatchNormalization", "config": config})
    found = convert.read(path)  # of four arrays, where the config tells of three
    assert "nothing tells which is what" in found.notes[0]
    assert not convert.find_keras(found.arrays).layers
    weights = {f"layers/bn/vars/{i}": np.full(3, i, F) for i in range(3)}
    with h5(tmp_path / "w.h5", **weights) as file:
        file["layers/bn/vars"].attrs["name"] = "batch_normalization_7"
    assert "nothing tells" in convert.read(tmp_path / "w.h5").notes[0]
    with h5(tmp_path / "w.h5", **weights) as file:
        file["layers/bn/vars"].attrs["name"] = "bn"
        layers = [{"class_name": "BatchNormalization", "config": config}]
        file.attrs["model_config"] = (
            str({"layers": layers}).replace("'", '"').replace("False", "false")
        )
    found = convert.find_keras(convert.read(tmp_path / "w.h5").arrays)
    layer = found.layers["layers/bn"]
    assert layer.params.scale is None
    np.testing.assert_array_equal(layer.params.bias, 0)
    np.testing.assert_array_equal(layer.state.var, 2)


def test_hdf5_reads_no_other_file_and_unpacks_no_bomb(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(bytes(12))
    with h5(tmp_path / "other.h5", secret=np.ones(3, F)):
        pass
    halves = np.arange(3, dtype=jnp.bfloat16)
    with h5(tmp_path / "m.h5", bn=np.ones(3, F), text=np.array([b"a"])) as file:
        file["link"] = h5py.ExternalLink("other.h5", "secret")
        file["soft"] = h5py.SoftLink("/bn")
        file.create_dataset("raw", (3,), "f4", external=[(str(tmp_path / "secret"), 0, 12)])
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", (3,))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("halves", data=halves.view("V2")).attrs["dtype"] = "bfloat16"
    found = convert.read(tmp_path / "m.h5")
    assert found.arrays.keys() == {"bn", "halves"}
    assert found.arrays["halves"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.arrays["halves"], halves)
    assert found.left_out.keys() == {"link", "soft", "raw", "virtual", "text"}
    with h5(tmp_path / "m.h5") as file:
        file.create_dataset("a", (10**6, 10**6), "f4", chunks=(100, 100), compression=9)
    with pytest.raises(convert.CheckpointError, match="max_bytes"):
        convert.read(tmp_path / "m.h5")
    with h5(tmp_path / "m.h5") as file:
        file["deep" + "/a" * 70] = np.ones(3)
    with pytest.raises(convert.CheckpointError, match="deeper than 64"):
        convert.read(tmp_path / "m.h5")


def test_batch_norms_of_onnx_are_told_by_their_nodes(tmp_path):
    pytest.importorskip("onnx")
    path = tmp_path / "model.onnx"
    for names, layer in (
        (("a", "b", "c", "d"), "norm/1"),
        (tuple(f"stage1_bn1_{name}" for name in KERAS), "stage1_bn1"),
    ):
        samples.of_onnx(path, names)
        found = convert.find_torch(convert.load(path), **convert.read(path).settings[layer])
        assert list(found.layers) == [layer]
        assert not found.left
        bn = found.layers[layer].bn
        assert (bn.epsilon, bn.momentum) == (0.01, 0.8)
    beside = {"save_as_external_data": True, "location": "data", "size_threshold": 0}
    samples.of_onnx(path, **beside)
    assert convert.load(path).keys() == STATE_DICT.keys()
    content = path.read_bytes()
    assert b"data" in content
    (tmp_path / "data").rename(tmp_path / "data2")
    (tmp_path / "data").symlink_to("data2")
    with pytest.raises(convert.CheckpointError, match="lie outside of its folder"):
        convert.load(path)
    (tmp_path / "data").unlink()
    with pytest.raises(convert.CheckpointError, match="which is not there"):
        convert.load(path)
    path.write_bytes(content.replace(b"data", b"/etc"))
    with pytest.raises(convert.CheckpointError, match="lie outside of its folder, at /etc"):
        convert.load(path)


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_leaves_of_equinox_are_named_by_the_model(mode, tmp_path):
    eqx = pytest.importorskip("equinox")
    norm, state = samples.equinox_norm(mode=mode)
    axes = {"axis_name": "batch", "in_axes": (0, None), "out_axes": (0, None)}
    x = jnp.arange(12, dtype=F).reshape(4, 3)
    for _ in range(3):
        _, state = jax.vmap(norm, **axes)(x, state)
    eqx.tree_serialise_leaves(tmp_path / "m.eqx", (norm, state))
    like = samples.equinox_norm(mode=mode)
    found = convert.find_equinox(convert.load(tmp_path / "m.eqx", like=like))
    (layer,) = found.layers.values()
    y, _ = layer.bn.apply(layer.params, layer.state, x, training=False)
    want, _ = jax.vmap(eqx.nn.inference_mode(norm), **axes)(x, state)
    np.testing.assert_allclose(y, want, rtol=1e-5)


def stats(*names):
    return dict(zip(names, NORM.values(), strict=True))


# How variables are named that are the same batch norm: by whom, and what finds it.
SPELLINGS = {
    "TensorFlow 2": (
        {f"layer-1/{n}/.ATTRIBUTES/VARIABLE_VALUE": a for n, a in KERAS.items()},
        convert.find_keras, "layer-1",
    ),
    "tf.keras": ({f"a/bn/{n}:0": a for n, a in KERAS.items()}, convert.find_keras, "a/bn"),
    "Keras in Orbax": (
        {
            f"{head}trainable_variables": {"m": {"bn": {n: KERAS[n] for n in names}}}
            for head, names in (("", [*KERAS][:2]), ("non_", [*KERAS][2:]))
        },
        convert.find_keras, "m/bn",
    ),
    "MXNet": (
        stats("arg:bn0_gamma", "arg:bn0_beta", "aux:bn0_moving_mean", "aux:bn0_moving_var"),
        convert.find_keras, "bn0",
    ),
    "Gluon": (
        stats(*(f"layer.{n}" for n in ("gamma", "beta", "running_mean", "running_var"))),
        convert.find_torch, "layer",
    ),
    "NNX": (
        stats(*(f"layers/1/{n}/value" for n in ("scale", "bias", "mean", "var"))),
        convert.find_flax, "layers/1",
    ),
    "linen in a train state": ({"state": LINEN}, convert.find_flax, "bn"),
    "torch.compile": (
        {f"module._orig_mod.{n}": a for n, a in STATE_DICT.items()},
        convert.find_torch, "module._orig_mod.bn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("whose", SPELLINGS)
def test_names_of_every_framework_are_understood(whose):
    arrays, find, name = SPELLINGS[whose]
    found = find(arrays)
    assert list(found.layers) == [name]
    assert not found.left
    layer = found.layers[name]
    got = (*layer.params, layer.state.mean, layer.state.var)
    for array, want in zip(got, NORM.values(), strict=True):
        np.testing.assert_array_equal(array, want)
    assert flat(found.put_back(found.layers)) == flat(arrays)


def flat(tree, path=""):
    if not isinstance(tree, dict):
        return [(path, np.asarray(tree).tolist())]
    return [leaf for name, part in tree.items() for leaf in flat(part, f"{path}/{name}")]


def test_a_layer_is_named_without_the_wrappers_around_it():
    wrapped = {f"module._orig_mod.{n}": a for n, a in STATE_DICT.items()}
    assert convert.from_torch(wrapped, "bn").params.scale is not None
    both = {**wrapped, **{f"module.{n}": a for n, a in STATE_DICT.items()}}
    with pytest.raises(ValueError, match="2 others"):
        convert.from_torch(both, "bn")
    layer = convert.from_torch(STATE_DICT, "bn", feature_axes=-1)  # of MLX
    assert layer.bn.feature_axes == -1


class Variable:
    """A variable as Keras has it."""

    def __init__(self, path, array):
        self.path, self.array, self.dtype = path, array, array.dtype

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_variables_are_taken_themselves_and_told_apart():
    variables = [Variable(f"bn/{name}", array) for name, array in KERAS.items()]
    found = convert.find_keras(variables)
    assert list(found.layers) == ["bn"]
    assert found.put_back(found.layers).keys() == {v.path for v in variables}
    with pytest.raises(ValueError, match="two variables have the path 'bn/gamma'"):
        convert.find_keras(variables + variables)


def test_arrays_that_are_no_numbers_are_left_out_and_listed(tmp_path):
    path = tmp_path / "m.npz"
    np.savez(path, **STATE_DICT, graph=np.array(b"\n\x01x"), made=np.array([print], object))
    found = convert.read(path)
    assert found.arrays.keys() == STATE_DICT.keys()
    assert found.left_out.keys() == {"graph", "made"}
    assert "left out: graph (array of texts), made (array of Python objects" in str(found)


# More of them, of each kind and format, in `python -m tests.tools.hostile_files`.
# When one array is broken, Orbax closes the event loop that others still report to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_hostile_files_do_no_harm(name, tmp_path):
    pytest.importorskip(FORMATS[name][0])
    chosen = [kind for i, kind in enumerate(dict.fromkeys(KINDS)) if (i + len(name)) % 2]
    results = []
    for seed, kind in enumerate(chosen):
        folder = tmp_path / kind
        folder.mkdir()
        results.append(outcome(name, kind, seed, folder))
    assert "refused" in results
    assert len(results) >= 6
    gc.collect()


def test_the_payload_of_hostile_files_is_real(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "made"))).close()
    assert (tmp_path / "made").exists()


def test_a_published_folder_of_tensorflow_goes_there_and_back():
    musicnn, _ = pytest.importorskip("musicnn"), pytest.importorskip("tensorflow")
    arrays = convert.load(Path(musicnn.__file__).parent / "MTT_vgg")
    found = convert.find_tf1(arrays)
    assert (len(found.layers), len(arrays)) == (6, 86)
    back = found.put_back(found.layers)
    for name, array in arrays.items():
        assert back[name].tobytes() == array.tobytes()
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
