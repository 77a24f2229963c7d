"""Runs Flax's own tests with our layers in the place of Flax's, and compares.

    git clone --branch v0.12.8 https://github.com/google/flax /tmp/flax
    python -m tests.tools.flax_suite /tmp/flax

`.peer_suite` runs the tests that build a BatchNorm. Then Flax's ImageNet
ResNet-50 takes one step over two devices, as it is and with the import changed: the trees
must be the same, and the arrays within 1e-5. Takes 10 minutes.
"""

import argparse
import sys
import tempfile
import types
from pathlib import Path

from tests.tools.peer_suite import compare


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
    with tempfile.TemporaryDirectory() as folder:
        broken = compare("flax", args.flax.resolve(), Path(folder))
    agrees = compare_resnet(args.flax)
    sys.exit(bool(broken) or not agrees)


if __name__ == "__main__":
    main()
