"""Properties that hold for all inputs, searched with hypothesis."""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from tests.laws import oracle

# One shape, so that each property compiles once.
ROWS, FEATURES = 12, 3
inputs = arrays.arrays(
    np.float32,
    (ROWS, FEATURES),
    elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
)
row_weights = arrays.arrays(
    np.float32, (ROWS,), elements=st.sampled_from([0.0, 0.25, 1.0, 7.0])
)
BN = jaxbn.BatchNorm(epsilon=1e-3)
PARAMS, STATE = BN.init(FEATURES)
apply = jax.jit(functools.partial(BN.apply, training=True))


@hypothesis.given(inputs, row_weights)
def test_moments_are_those_of_the_definition(x, weights):
    batch = jaxbn.moments(x, weights=weights)
    mean, var, total = (m[0] for m in oracle.moments(x.astype(np.float64), -1, weights))
    np.testing.assert_allclose(batch.count, total)
    assert (np.abs(batch.mean - mean) <= 1e-6 * np.abs(x).max(0) + 1e-30).all()
    rounding = np.square(1e-6 * np.abs(x).max(0).astype(np.float64))
    assert (np.abs(batch.var - var) <= 1e-5 * var + rounding).all()
    assert (batch.var >= 0).all()


@hypothesis.given(inputs, st.permutations(range(ROWS)))
def test_the_order_of_rows_does_not_matter(x, order):
    y, state = apply(PARAMS, STATE, x)
    shuffled, after = apply(PARAMS, STATE, x[np.array(order)])
    np.testing.assert_allclose(shuffled, y[np.array(order)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after.mean, state.mean, rtol=1e-5, atol=1e-5)


@hypothesis.given(inputs, row_weights)
def test_a_weight_is_a_number_of_repetitions(x, weights):
    counts = np.round(weights).astype(int)
    weighted = jaxbn.moments(x, weights=counts)
    repeated = jaxbn.moments(np.repeat(x, counts, axis=0))
    for one, other in zip(weighted, repeated, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


@hypothesis.given(inputs, st.integers(0, ROWS), st.integers(0, ROWS), row_weights)
def test_merged_parts_equal_the_whole_in_any_order(x, first, second, weights):
    cuts = sorted((first, second))
    parts = [
        jaxbn.moments(part, weights=weight)
        for part, weight in zip(np.split(x, cuts), np.split(weights, cuts), strict=True)
    ]
    a, b, c = parts
    whole = jaxbn.moments(x, weights=weights)
    for merged in (
        jaxbn.merge_moments(jaxbn.merge_moments(a, b), c),
        jaxbn.merge_moments(a, jaxbn.merge_moments(b, c)),
        jaxbn.merge_moments(c, jaxbn.merge_moments(b, a)),
    ):
        np.testing.assert_allclose(merged.count, whole.count)
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(merged.var, whole.var, rtol=1e-4, atol=1e-2)


@hypothesis.given(inputs, st.floats(0.125, 8.0), st.floats(-100.0, 100.0))
def test_scaling_and_shifting_the_input_changes_nothing(x, factor, offset):
    hypothesis.assume((x.astype(np.float64).std(0) > 1.0).all())
    bn = jaxbn.BatchNorm(epsilon=1e-12)
    y, _ = bn.apply(PARAMS, STATE, jnp.asarray(x), True)
    moved, _ = bn.apply(PARAMS, STATE, jnp.asarray(x * np.float32(factor) + offset), True)
    np.testing.assert_allclose(moved, y, atol=2e-3)
