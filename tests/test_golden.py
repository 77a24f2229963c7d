"""Recorded cases of the real systems and of float64 truth; `--golden DIR` runs others.

A case is named `system-case`, so that `-k truth` selects a system. How a case of a system
is run is told in `tests/golden_<system>.py`, by a function `run(case)`.
"""

import json

from tests import (
    golden_eqx,
    golden_haiku,
    golden_keras,
    golden_linen,
    golden_nnx,
    golden_tf1,
    golden_torch,
    golden_truth,
)
from tests.golden_case import Case

RUNNERS = {
    "eqx": golden_eqx.run,
    "haiku": golden_haiku.run,
    "keras": golden_keras.run,
    "linen": golden_linen.run,
    "nnx": golden_nnx.run,
    "tf1": golden_tf1.run,
    "torch": golden_torch.run,
    "truth": golden_truth.run,
}


def pytest_generate_tests(metafunc):
    folder = metafunc.config.getoption("--golden")
    observed_file = folder / "observed_error.json"
    observed = (
        json.loads(observed_file.read_text())["cases"] if observed_file.exists() else {}
    )
    cases = [
        Case(folder, meta, observed)
        for meta in json.loads((folder / "manifest.json").read_text())["cases"]
    ]
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases, ids=str)
    if "systems" in metafunc.fixturenames:
        metafunc.parametrize("systems", [{case.system for case in cases}], ids=["all"])


def test_case(case):
    assert case.system in RUNNERS, f"no runner for the system {case.system!r}"
    RUNNERS[case.system](case)


def test_every_system_is_known(systems):
    assert systems <= set(RUNNERS)
