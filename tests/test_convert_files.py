"""Files of arrays: there and back, all or nothing, and safe to read whatever they hold."""

import io
import json
import os
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import convert

F = np.float32
ARRAYS = {
    "bn/scale": np.arange(6, dtype=F).reshape(2, 3).T,
    "bn.running_var": np.ones(4, ">f4"),
    "count": np.int64(3),
    "empty": np.zeros((0, 2), np.float16),
    "flag": np.array([True, False]),
    "../ä": np.array([1 + 2j], np.complex64),
}
HALVES = {
    "bf16": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
    "f8": np.asarray(jnp.ones((2, 2), jnp.float8_e4m3fn)),
    "scalar": np.ones((), jnp.bfloat16),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_there_and_back(suffix, tmp_path):
    arrays = ARRAYS | (HALVES if suffix == ".safetensors" else {})
    path = tmp_path / f"model{suffix}"
    convert.save(path, arrays)
    back = convert.load(str(path))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype.newbyteorder("="), name
        assert back[name].shape == array.shape, name
        np.testing.assert_array_equal(back[name], array)
    if suffix == ".npz":
        with np.load(path) as other:
            assert set(other) == set(arrays)
    assert os.listdir(tmp_path) == [path.name]
    bytes_before = path.read_bytes()
    convert.save(path, arrays)
    assert path.read_bytes() == bytes_before


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_save_that_fails_leaves_what_was_there(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    convert.save(path, {"a": np.ones(2, F)})
    before = path.read_bytes()
    with pytest.raises(convert.CheckpointError, match=r"'b'.*object"):
        convert.save(path, {"a": np.zeros(2, F), "b": np.array([None])})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_crash_while_saving_leaves_what_was_there(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"model{suffix}"
    convert.save(path, {"a": np.ones(2, F)})

    def crash(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk"):
        convert.save(path, {"a": np.zeros(2, F)})
    np.testing.assert_array_equal(convert.load(path)["a"], 1)
    assert os.listdir(tmp_path) == [path.name]


class Payload:
    """What a pickle may do: this one makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def npy(array=None, header=None, body=b""):
    """Returns a .npy member of an array, or of a header that need not be true."""
    buffer = io.BytesIO()
    if header is None:
        np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=True)
    else:
        np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + body


def zipped(*members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def tensors(header, data=b"\0" * 8, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = npy(np.ones(2, F))
HEADER = {"descr": "<f4", "fortran_order": False, "shape": (2,)}
# What a file may hold that is no checkpoint: its name, its content, and what is told.
HOSTILE = {
    "npz of nothing": ("a.npz", b"", "not a zip"),
    "npz of text": ("a.npz", b"hello", "not a zip"),
    "npz truncated": ("a.npz", zipped(("a.npy", GOOD))[:-30], "not a zip"),
    "npz of another member": ("a.npz", zipped(("a.txt", b"hi")), "'a.txt' is not an array"),
    "npz of no array": ("a.npz", zipped(("a.npy", b"hello")), "header of 'a'"),
    "npz of objects": (
        "a.npz", lambda made: zipped(("a.npy", npy(np.array([Payload(made)], object)))),
        "'a'.*pickle",
    ),
    "npz that is a pickle": (
        "a.npz", lambda made: pickle.dumps(Payload(made)), "is a pickle",
    ),
    "npz of a pickle": (
        "a.npz", lambda made: zipped(("a.npy", pickle.dumps(Payload(made)))),
        "header of 'a'",
    ),
    "npz of texts": (
        "a.npz", zipped(("a.npy", npy(np.array(["b"])))), "numbers; beside 'a' .*texts",
    ),
    "npz of structures": (
        "a.npz", zipped(("a.npy", npy(np.zeros(2, [("x", F)])))), r"'a'.*\.safetensors",
    ),
    "npz of bfloat16": (
        "a.npz", zipped(("a.npy", npy(header={**HEADER, "descr": "<V2"}, body=b"1234"))),
        r"'a'.*\.safetensors",
    ),
    "npz too long": (
        "a.npz", zipped(("a.npy", npy(header=HEADER, body=b"123456789"))),
        r"\(2,\).* 9 bytes",
    ),
    "npz of a huge shape": (
        "a.npz", zipped(("a.npy", npy(header={**HEADER, "shape": (2**40, 2**40)}))),
        "max_bytes",
    ),
    "npz of a negative shape": (
        "a.npz",
        zipped(("a.npy", npy(header={**HEADER, "shape": (-1, -2)}, body=b"1" * 8))),
        "shape|header",
    ),
    "npz bomb": (
        "a.npz",
        zipped(("a.npy", b"\0" * 30_000_000), compression=zipfile.ZIP_DEFLATED),
        "30000000 bytes.*max_bytes=10000000",
    ),
    "safetensors too large": (
        "a.safetensors", b"\0" * 10_000_001, "10000001 bytes.*max_bytes=10000000",
    ),
    "safetensors of nothing": ("a.safetensors", b"", "header"),
    "safetensors of text": ("a.safetensors", b"hello world", "header"),
    "safetensors truncated": ("a.safetensors", tensors({"a": entry()}, b"1234"), "."),
    "safetensors giant header": ("a.safetensors", tensors({}, size=2**60), "header"),
    "safetensors long header": ("a.safetensors", tensors({}, size=100), "header"),
    "safetensors deep header": ("a.safetensors", tensors(b"[" * 100_000), "header|JSON"),
    "safetensors of no JSON": ("a.safetensors", tensors(b"{'a'"), "JSON|header"),
    "safetensors overlap": (
        "a.safetensors", tensors({"a": entry(), "b": entry()}), "offset|header",
    ),
    "safetensors beyond": (
        "a.safetensors", tensors({"a": entry((2**40,), offsets=(0, 2**42))}), ".",
    ),
    "safetensors names twice": (
        "a.safetensors",
        tensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "one name|duplicate",
    ),
    "safetensors dtype": (
        "a.safetensors", tensors({"a": entry(dtype="Q9")}), "header|dtype|variant",
    ),
    "safetensors that is a pickle": (
        "a.safetensors", lambda made: pickle.dumps(Payload(made)), "is a pickle",
    ),
    "pickle by another name": (
        "a.pkl", lambda made: pickle.dumps(Payload(made)), "refused",
    ),
    "torch pickle": (
        "a.pth", lambda made: pickle.dumps(Payload(made), protocol=2), "refused",
    ),
}  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_file_is_refused_with_its_name_and_the_reason(hostile, tmp_path):
    name, content, reason = HOSTILE[hostile]
    if name.endswith(".pth"):
        pytest.importorskip("torch")
    made = tmp_path / "made"
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content(made))
    with pytest.raises(convert.CheckpointError, match=reason) as caught:
        convert.load(path, max_bytes=10_000_000)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")
    assert not made.exists()
    pickled = b"open" in path.read_bytes()
    if pickled and hostile.endswith("a pickle"):
        # The payload is real: whoever unpickles it has run it.
        pickle.loads(pickle.dumps(Payload(made))).close()
        assert made.exists()


def test_names_of_one_file_are_told_apart(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.warns(UserWarning, match="Duplicate name"):
        path.write_bytes(zipped(("a.npy", GOOD), ("a.npy", GOOD)))
    with pytest.raises(convert.CheckpointError, match="two arrays of the name 'a'"):
        convert.load(path)
    with pytest.raises(convert.CheckpointError, match="NUL"):
        convert.save(path, {"a\0b": np.ones(2)})
    with pytest.raises(FileNotFoundError):
        convert.load(tmp_path / "none.npz")


def mutated(rng, content, header):
    """Returns `content` with flipped bytes, cut off, or with another header."""
    kind = rng.integers(4)
    content = bytearray(content)
    if kind == 0:
        return bytes(content[: rng.integers(len(content))])
    if kind == 1:
        where = rng.integers(len(content), size=rng.integers(1, 9))
    else:
        where = rng.integers(header, size=rng.integers(1, 4))
    for place in where:
        digit = 48 <= content[place] < 58
        content[place] = rng.integers(48, 58) if digit and kind == 3 else rng.integers(256)
    if kind == 2 and rng.integers(2):
        place = rng.integers(header)
        content[place:place] = bytes(rng.integers(256, size=rng.integers(1, 20)).tolist())
    return bytes(content)


def loaded(path):
    try:
        return convert.load(path), ""
    except convert.CheckpointError as error:
        return {}, str(error)


@pytest.mark.parametrize(("suffix", "count"), [(".npz", 500), (".safetensors", 500)])
def test_mutated_files_give_arrays_or_one_clear_error(suffix, count, tmp_path):
    path = tmp_path / f"model{suffix}"
    small = {"bn.weight": np.ones(3, F), "bn.var": np.ones((2, 2)), "n": np.int64(1)}
    convert.save(path, small)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(rng, good, min(len(good), 400)))
        arrays, error = loaded(path)
        assert all(array.dtype.kind in "biufc" for array in arrays.values())
        refused += error != ""
        assert not error or (str(path) in error and len(error) < 700)
    assert refused > count / 2
    assert os.listdir(tmp_path) == [path.name]


def test_files_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    tree = {
        "epoch": 3,
        "model": {"bn.running_var": torch.arange(3.0).to(torch.bfloat16)},
        "optimizer": {"state": [torch.nn.Parameter(torch.ones(2, 2).T)]},
    }
    for legacy in (False, True):
        path = tmp_path / "model.pth"
        torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
        arrays = convert.load(path)
        assert list(arrays) == ["model.bn.running_var", "optimizer.state.0"]
        assert arrays["model.bn.running_var"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(arrays["model.bn.running_var"].astype(F), [0, 1, 2])
    hostile = {
        "more than tensors": torch.nn.Linear(2, 2),
        "max_bytes": {"a": torch.zeros(1).expand(10**12)},
        "two arrays of the name 'a.b'": {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}},
        "sparse": {"a": torch.eye(2).to_sparse()},
        "no arrays of numbers": {"a": 1},
    }
    loop = hostile["nested"] = {}
    loop["again"] = loop
    for reason, value in hostile.items():
        torch.save(value, path)
        with pytest.raises(convert.CheckpointError, match=reason) as caught:
            convert.load(path)
        assert "weights_only=False" not in str(caught.value)


# What each format needs: a file of it, as it begins, and what a user is told to install.
PACKAGES = {
    "torch": (zipped(("model/data.pkl", b"")), "pip install torch"),
    "safetensors": (tensors({}), r"pip install 'jaxbn\[convert\]'"),
    "h5py": (b"\x89HDF\r\n\x1a\n", r"pip install 'jaxbn\[convert\]'"),
    "onnx": (b"\x08\x08\x12\x00", r"pip install 'jaxbn\[convert\]'"),
    "flax.serialization": (b"\x81\xa1a\xc0", r"pip install 'jaxbn\[flax\]'"),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_missing_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    content, remedy = PACKAGES[package]
    path = tmp_path / "model"
    path.write_bytes(content)
    with pytest.raises(ImportError, match=remedy):
        convert.load(path)


def test_a_folder_of_orbax_is_read_as_it_was_saved(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    norm = {"mean": np.zeros(3, F), "var": np.full(3, 2, F)}
    tree = {"params": {"bn": {"scale": np.ones(3, F)}}, "batch_stats": {"bn": norm}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", tree)
    found = convert.find_flax(convert.load(tmp_path / "model"))
    np.testing.assert_array_equal(found.layers["bn"].state.var, 2)
    with pytest.raises(convert.CheckpointError, match=r"36 bytes.*max_bytes=35"):
        convert.load(tmp_path / "model", max_bytes=35)
    (tmp_path / "empty").mkdir()
    with pytest.raises(convert.CheckpointError, match="_METADATA"):
        convert.load(tmp_path / "empty")


@pytest.mark.parametrize("value", [convert.Converted, convert.EmaBatchNorm, convert.load])
def test_public_values_name_the_public_module(value):
    assert value.__module__ == "jaxbn.convert"
    assert pickle.loads(pickle.dumps(value)) is value
