"""The programs run as their headers say, on less of everything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.compiling import fast_environment

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    "mnist.py": ["--epochs", "2", "--out", "{tmp}/mnist.png"],
    "pmap_training.py": ["--epochs", "1", "--devices", "2"],
    "shard_map_training.py": ["--epochs", "1", "--devices", "2"],
    "resnet.py": ["--epochs", "1", "--checkpoints", "{tmp}/linen"],
    "resnet_nnx.py": ["--epochs", "1", "--checkpoints", "{tmp}/nnx"],
    "tf1/contrib_comparison.py": ["--epochs", "1", "--small-batch-size", "25"],
    "tf1/dense_elu.py": ["--epochs", "1"],
    "tf1/handwritten_dropout.py": ["--epochs", "1"],
    "tf1/handwritten_images.py": ["--epochs", "1"],
}


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, EXAMPLES / program, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | fast_environment(),
    )


@pytest.mark.parametrize("program", SHORT)
def test_a_program_runs(program, tmp_path):
    done = run(program, *(word.format(tmp=tmp_path) for word in SHORT[program]))
    assert done.returncode == 0, done.stderr[-2000:]
    for word in SHORT[program]:
        if word.endswith(".png"):
            assert (tmp_path / "mnist.png").stat().st_size > 10_000


def test_reestimation_rescues_averaged_weights():
    done = run("swa.py", "--seeds", "2", "--epochs", "12")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\w+ weights, .*? (0\.\d.*)$", done.stdout, re.MULTILINE)
    table = np.array([row.split() for row in rows], float)
    # The header promises it on average, which is the last column.
    last, stale, averaged, reestimated = table[:, -1]
    assert stale + 0.01 < reestimated
    # Fewer seeds and epochs than the header's leave this difference within the noise.
    assert last - 0.01 < reestimated
    assert stale < averaged


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["--epochs", "0"], "epochs"),
        (["--momentum", "1.5"], "momentum"),
        (["--batch-size", "5000"], "batch-size"),
        (["--out", "nowhere/mnist.png"], "out"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_work(arguments, fact):
    done = run("mnist.py", *arguments)
    assert done.returncode == 2
    assert f"--{fact}: must be" in done.stderr
