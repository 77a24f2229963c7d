"""How long the way from x to its gradient is: files, functions and lines, never seconds."""

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxbn
import jaxbn.linen

OPTIMIZED = True
ROOT = str(Path(jaxbn.__file__).parent)
# flax.linen runs 1 file and 6 functions of its own; jaxbn ran 17 and 103 before.
MOST_FILES, MOST_FUNCTIONS, MOST_CHANGES = 10, 70, 45


def calls_of(function, *arguments):
    """Returns the file and the name of each function of jaxbn that tracing calls."""
    calls = []

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(ROOT):
            calls.append((code.co_filename, code.co_qualname))

    jax.clear_caches()
    sys.setprofile(profile)
    try:
        jax.make_jaxpr(function)(*arguments)
    finally:
        sys.setprofile(None)
    # Python 3.11 calls comprehensions, and every version generators.
    return [call for call in calls if not call[1].endswith(("comp>", "<genexpr>"))]


def test_a_reader_of_one_step_opens_ten_files():
    bn = jaxbn.BatchNorm()
    params, state = bn.init(64)
    x = jnp.ones((32, 16, 16, 64))

    def forward(params, x):
        return bn.apply(params, state, x, True)

    def step(params, x):
        loss = lambda params, x: forward(params, x)[0].sum()
        return jax.value_and_grad(loss, (0, 1))(params, x)

    # What `init` makes is checked against once for each layer, before any step.
    jax.eval_shape(forward, params, x)
    calls = calls_of(step, params, x)
    assert len({file for file, _ in calls}) <= MOST_FILES
    assert len(set(calls)) <= MOST_FUNCTIONS
    files = [file for file, _ in calls_of(forward, params, x)]
    changes = 1 + sum(a != b for a, b in itertools.pairwise(files))
    assert changes <= MOST_CHANGES


class Block(nn.Module):
    features: int
    norm: type

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(self.norm, use_running_average=False)
        y = nn.relu(norm()(nn.Conv(self.features, (1, 1), use_bias=False)(x)))
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y)))
        y = norm()(nn.Conv(4 * self.features, (1, 1), use_bias=False)(y))
        return nn.relu(x + y)


class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        for features in (16, 16, 16, 16):
            x = Block(features, self.norm)(x)
        return x.mean((1, 2))


def lowered_step(norm, platform):
    net = Net(norm)
    x = jax.ShapeDtypeStruct((8, 32, 32, 64), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)

    def step(variables, x):
        def loss(params):
            every = {**variables, "params": params}
            y, updates = net.apply(every, x, mutable=["batch_stats"])
            return y.sum(), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    traced = jax.jit(step).trace(variables, x)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_network_lowers_to_no_more_lines_than_with_flax(platform):
    ours, theirs = (
        len(lowered_step(norm, platform).splitlines())
        for norm in (jaxbn.linen.BatchNorm, nn.BatchNorm)
    )
    assert ours <= theirs


def test_equal_layers_share_one_function():
    text = lowered_step(jaxbn.linen.BatchNorm, "tpu")
    # 12 layers in 2 shapes, forward and backward; the first block's input may differ.
    functions = [line for line in text.splitlines() if "func.func private @_apply" in line]
    assert len(functions) <= 6


# A train step with gradients; prints how many of its programs the cache had, and had not.
CACHED = """
import sys, jax, jax.numpy as jnp, jaxbn
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
bn = jaxbn.BatchNorm(activation=jax.nn.relu)
params, state = bn.init(32)
x = jnp.ones((64, 16, 16, 32))

@jax.jit
def step(params, state, x):
    loss = lambda params, x: bn.apply(params, state, x, True)[0].sum()
    return jax.grad(loss, (0, 1))(params, x)

events.clear()
jax.block_until_ready(step(params, state, x))
for what in ("hits", "misses"):
    print(events.count(f"/jax/compilation_cache/cache_{what}"))
"""


def test_another_process_finds_the_compiled_program(tmp_path):
    def run():
        done = subprocess.run(
            [sys.executable, "-c", CACHED, str(tmp_path)],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [int(count) for count in done.stdout.split()]

    assert run() == [0, 1]
    assert run() == [1, 0]
