"""State below float32 never stalls silently, and nothing that is not finite is stored."""

import doctest
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from jaxbn.diagnose import diagnose

HALVES = jnp.bfloat16, jnp.float16
X = 3 + 2 * jax.random.normal(jax.random.key(1), (64, 2))


class Own(jaxbn.Normalizer):
    def init(self, num_features):
        return jaxbn.BatchNorm().init(num_features)

    def standardize(self, mean, var):
        return 1 / jnp.sqrt(var + 1e-5), None

    def track(self, state, batch):
        return jaxbn.update_running(state, batch)


NORMALIZERS = {
    "plain": jaxbn.BatchNorm(),
    "debiased": jaxbn.BatchNorm(debias=True),
    "cumulative": jaxbn.BatchNorm(momentum=None),
    "renorm": jaxbn.BatchRenorm(),
    "ghosts": jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 32),
    "gather": jaxbn.Gather(jaxbn.BatchNorm()),
    "ema": convert.EmaBatchNorm(),
    "own": Own(),
}


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NORMALIZERS)
def test_training_refuses_a_half_precision_state_with_its_leaf(name, dtype):
    bn = NORMALIZERS[name]
    params, state = bn.init(2)
    half = cast(state, dtype)
    words = rf"state\.mean is {jnp.dtype(dtype)}.*state\.mean\.astype\(jnp\.float32\)"
    for training in (True, jnp.array(True)):
        with pytest.raises(TypeError, match=words):
            bn.apply(params, half, X, training)
    y, _ = bn.apply(params, half, X, False)
    np.testing.assert_allclose(y, bn.apply(params, state, X, False)[0], rtol=1e-6)
    last = state._replace(var=state.var.astype(dtype))
    with pytest.raises(TypeError, match=r"state\.var is"):
        bn.apply(params, last, X, True)


def test_a_state_that_gathers_is_refused_too():
    bn = jaxbn.Gather(jaxbn.BatchNorm())
    params, state = bn.init(2)
    with pytest.raises(TypeError, match=r"mean is bfloat16"):
        bn.apply(params, jaxbn.gather(cast(state, jnp.bfloat16)), X, True)


def test_an_average_in_half_precision_is_refused():
    ema = jaxbn.Ema(0.9)
    state = cast(ema.init({"w": X}), jnp.bfloat16)
    with pytest.raises(TypeError, match=r"state\.average\['w'\] is bfloat16.*float32"):
        ema.update(state, {"w": X})


@pytest.mark.parametrize("name", NORMALIZERS)
def test_modules_for_any_normalizer_widen_the_statistics(name):
    layer = jaxbn.linen.Norm(NORMALIZERS[name], use_running_average=False)
    variables = layer.init(jax.random.key(0), X)
    _, right = layer.apply(variables, X, mutable=["batch_stats"])
    _, got = layer.apply(cast(variables, jnp.bfloat16), X, mutable=["batch_stats"])
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_allclose(leaf, want, rtol=2e-2)
    module = jaxbn.nnx.Norm(NORMALIZERS[name], 2)
    graph, state = nnx.split(module)
    module = nnx.merge(graph, cast(state, jnp.bfloat16))
    module(X)
    stats = jax.tree.leaves(nnx.state(module, nnx.BatchStat))
    assert {leaf.dtype for leaf in stats} == {jnp.dtype(jnp.float32)}


def batch_of(mean, var, dtype):
    arrays = ([mean, 1.0], [var, 2.0], [4.0, 4.0])
    return jaxbn.Moments(*(jnp.array(array, dtype) for array in arrays))


@pytest.mark.parametrize(
    ("low", "high", "large"),
    [
        ("float16", "float32", 1e7),
        ("float32", "float64", 1e41),
        ("bfloat16", "float64", 1e41),
    ],
)
@pytest.mark.parametrize("weight", ["none", "debiased", "cumulative"])
@pytest.mark.parametrize("field", ["mean", "var"])
def test_what_does_not_fit_the_state_leaves_the_feature(
    low, high, large, weight, field, x64
):
    zeros, ones = jnp.zeros(2, low), jnp.ones(2, low)
    state = jaxbn.BatchStats(zeros, ones, None if weight == "none" else zeros)
    moments = {"mean": 0.5, "var": 1.0} | {field: large}
    batch = batch_of(moments["mean"], moments["var"], high)
    momentum = None if weight == "cumulative" else 0.5
    after = jaxbn.update_running(state, batch, momentum=momentum)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert new.dtype == old.dtype
        assert new[0] == old[0]
    assert after.mean[1] == (0.5 if weight == "none" else 1)
    assert after.var[1] == (1.5 if weight == "none" else 2)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_one_large_float64_batch_poisons_no_state(name, x64):
    bn = NORMALIZERS[name]
    params, state = bn.init(2)
    large = X.astype(jnp.float64) * jnp.array([[1e30, 1.0]])
    step = jax.jit(lambda state, x: bn.apply(params, state, x, True)[1])
    after = step(state, large)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert new.dtype == old.dtype
        assert new[0] == old[0]
    assert after.mean[1] != 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(step(after, X)))


def test_reestimate_changes_nothing_that_does_not_fit(x64):
    bn = jaxbn.Gather(jaxbn.BatchNorm(param_dtype=jnp.float64))
    params, state = bn.init(2)
    small = cast(state, jnp.float32)

    def step(states, x):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), states)
        return bn.apply(params, wide, x, True)[1]

    with pytest.raises(ValueError, match=r"more than its float32 holds\. No state"):
        jaxbn.reestimate(step, small, [X.astype(jnp.float64) * 1e30])


def test_a_converted_layer_says_that_its_statistics_were_widened():
    arrays = {f"bn.{name}": np.ones(3, "f2") for name in ("running_mean", "running_var")}
    layer = convert.from_torch(arrays, "bn")
    assert layer.state.mean.dtype == layer.state.var.dtype == jnp.float32
    assert "running_var widened from float16 to float32" in layer.notes


@pytest.mark.parametrize("dtype", HALVES)
def test_diagnose_names_low_precision(dtype):
    params, state = jaxbn.BatchNorm().init(2)
    _, state = jaxbn.apply(params, state, X, True)
    assert "low-precision" not in diagnose((cast(params, dtype), state)).causes
    report = diagnose((params, cast(state, dtype)))
    (finding,) = [f for f in report.findings if f.cause == "low-precision"]
    assert str(jnp.dtype(dtype)) in finding.message
    assert "float32" in finding.remedy


def test_the_policy_of_the_documentation_works():
    page = Path(__file__).parent.parent / "docs" / "numerics.md"
    test = doctest.DocTestParser().get_doctest(page.read_text(), {}, "numerics", None, 0)
    assert len(test.examples) > 8
    assert doctest.DocTestRunner().run(test).failed == 0
