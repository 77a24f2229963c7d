"""Recorded cases of the real systems and of float64 truth; `--golden DIR` runs others.

A case is named `system-case`, so that `-k truth` selects a system. How a case of a system
is run is told in `tests/golden_runners/<system>.py`, by a function `run(case)`.
"""

import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.golden_runners import (
    eqx,
    haiku,
    keras,
    linen,
    nnx,
    tf1,
    tf1_arguments,
    torch,
    truth,
)
from tests.golden_runners.case import Case

RUNNERS = {
    "eqx": eqx.run,
    "haiku": haiku.run,
    "keras": keras.run,
    "linen": linen.run,
    "nnx": nnx.run,
    "tf1": tf1.run,
    "torch": torch.run,
    "truth": truth.run,
}


# Made by the same generators, with arguments that no case of golden/ has.
MORE = Path(__file__).parent / "recorded" / "arguments"


def cases_in(folder):
    """Returns the cases of the manifest of a folder."""
    observed_file = folder / "observed_error.json"
    observed = {}
    if observed_file.exists():
        observed = json.loads(observed_file.read_text())["cases"]
    manifest = json.loads((folder / "manifest.json").read_text())
    return [Case(folder, meta, observed) for meta in manifest["cases"]]


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden")
    cases = cases_in(folder)
    if folder == Path(__file__).parent / "golden":
        cases += cases_in(MORE)
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=str)
    if "systems" in metafunc.fixturenames:
        metafunc.parametrize("systems", [{case.system for case in cases}], ids=["all"])


def test_case(case):
    assert case.system in RUNNERS, f"no runner for the system {case.system!r}"
    RUNNERS[case.system](case)


def test_every_system_is_known(systems):
    assert systems <= set(RUNNERS)


@pytest.mark.parametrize("name", tf1_arguments.REGULARIZERS)
def test_regularizers_of_tensorflow_leave_a_weight_of_0_alone(name):
    regularizer = tf1_arguments.REGULARIZERS[name]
    options = dict.fromkeys(inspect.signature(regularizer).parameters, 0.5)
    value, gradient = jax.value_and_grad(regularizer(**options))(jnp.array([0.0, -2.0]))
    assert (value > 0, gradient[0], gradient[1] < 0) == (True, 0, True)
