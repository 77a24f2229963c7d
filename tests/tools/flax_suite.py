"""Runs Flax's own tests with our layers in the place of Flax's, and compares.

    git clone --branch v0.12.8 https://github.com/google/flax /tmp/flax
    python -m tests.tools.flax_suite /tmp/flax

Flax's code is not ours to carry: this script is given a checkout of it, of the release
that is installed. The test files that name BatchNorm are run as they are, which tells the
tests that build one and pass; these are run again with `flax.linen.BatchNorm` and
`flax.nnx.BatchNorm` replaced before collection, and must pass again. Then Flax's ImageNet
ResNet-50 takes one step over two devices, as it is and with the import changed: the trees
must be the same, and the arrays within 1e-5. Takes 10 minutes.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MADE = set()
# Where Flax keeps the two classes: the modules that define them and those that export.
PLACES = {
    "jaxbn.linen": ("flax.linen.normalization", "flax.linen"),
    "jaxbn.nnx": ("flax.nnx.nn.normalization", "flax.nnx"),
}


def substitute():
    """Puts our classes in the place of Flax's."""
    for ours, theirs in PLACES.items():
        replacement = importlib.import_module(ours).BatchNorm
        for place in theirs:
            module = importlib.import_module(place)
            assert module.BatchNorm.__module__.startswith("flax."), place
            module.BatchNorm = replacement


def watch():
    """Notes the tests in which a BatchNorm is made, to tell how many there are."""
    for theirs in PLACES.values():
        cls = importlib.import_module(theirs[0]).BatchNorm
        original = cls.__init__

        def init(self, *args, _original=original, **kwargs):
            MADE.add(os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" (", 1)[0])
            _original(self, *args, **kwargs)

        cls.__init__ = init


def pytest_configure():
    if os.environ.get("JAXBN_SUBSTITUTE"):
        substitute()
    if os.environ.get("JAXBN_WATCH"):
        watch()


def pytest_sessionfinish():
    if os.environ.get("JAXBN_WATCH"):
        Path(os.environ["JAXBN_WATCH"]).write_text("\n".join(sorted(MADE)))


def run(flax, tests, folder, name, **environment):
    """Returns the outcome of every test, and prints the last line of pytest."""
    report = folder / f"{name}.xml"
    listed = folder / "tests"
    listed.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.tools.flax_suite"]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-W", "default", f"@{listed}"]
    here = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        cwd=flax,
        env={**os.environ, "PYTHONPATH": here, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{name}: {done.stdout.strip().splitlines()[-1]}", flush=True)
    if not report.exists():
        raise SystemExit(done.stdout + done.stderr)
    return outcomes(report)


def outcomes(report):
    """Returns what became of every test, under the name that pytest calls it by."""
    result = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        *modules, last = case.get("classname").split(".")
        file = "/".join([*modules, last] if last.endswith("_test") else modules) + ".py"
        owner = "" if last.endswith("_test") else f"{last}::"
        result[f"{file}::{owner}{case.get('name')}"] = kinds.pop() if kinds else "passed"
    return result


def compare_resnet(flax):
    """Compares one step of Flax's example model with that of ours in its place."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_num_cpu_devices", 2)
    text = (flax / "examples/imagenet/models.py").read_text()
    old, new = "from flax import linen as nn", "from jaxbn.linen import BatchNorm"
    assert old in text
    changed = text.replace(old, f"{old}\n{new}").replace("nn.BatchNorm", "BatchNorm")
    want, got = (resnet_step(source) for source in (text, changed))
    for a, b in zip(want, got, strict=True):
        assert jax.tree.structure(a) == jax.tree.structure(b)
    errors = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max() / (jnp.abs(a).max() + 1e-12)), want, got
    )
    worst = max(jax.tree.leaves(errors))
    print(f"ResNet-50: one step differs by {worst:.1e} of the largest value of a leaf")
    return worst <= 1e-5


def resnet_step(text):
    """Returns the variables before and after one step of SGD over two devices."""
    import jax
    import jax.numpy as jnp
    import optax

    module = types.ModuleType("models")
    sys.modules["models"] = module  # where a dataclass looks up its annotations
    exec(compile(text, "models", "exec"), module.__dict__)
    model = module.ResNet50(num_classes=1000, dtype=jnp.float32)
    images = jax.random.normal(jax.random.key(0), (2, 4, 64, 64, 3))
    labels = jnp.arange(8).reshape(2, 4)
    variables = model.init(jax.random.key(1), images[0], train=False)

    def step(images, labels):
        def loss(params):
            y, updates = model.apply(
                {**variables, "params": params}, images, mutable=["batch_stats"]
            )
            crossed = optax.softmax_cross_entropy_with_integer_labels(y, labels)
            return crossed.mean(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        grads = jax.lax.pmean(grads, "batch")
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params, **updates}

    after = jax.pmap(step, axis_name="batch")(images, labels)
    return variables, jax.tree.map(lambda leaf: leaf[0], after)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flax", type=Path, help="a checkout of Flax's repository")
    args = parser.parse_args()
    files = sorted(args.flax.glob("tests/**/*_test.py"))
    files = [file for file in files if "BatchNorm" in file.read_text()]
    files = [str(file.relative_to(args.flax)) for file in files]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        made = folder / "made"
        theirs = run(args.flax, files, folder, "flax", JAXBN_WATCH=str(made))
        tests = [
            name for name in made.read_text().split("\n") if theirs.get(name) == "passed"
        ]
        print(f"{len(tests)} tests build a BatchNorm and pass with Flax's", flush=True)
        ours = run(args.flax, tests, folder, "jaxbn", JAXBN_SUBSTITUTE="1")
    broken = [name for name in tests if ours.get(name) != "passed"]
    print(f"{len(tests) - len(broken)} of {len(tests)} pass with ours")
    for name in broken:
        print(f"BROKEN {name}: {ours.get(name, 'absent')}")
    agrees = compare_resnet(args.flax)
    sys.exit(bool(broken) or not agrees)


if __name__ == "__main__":
    main()
