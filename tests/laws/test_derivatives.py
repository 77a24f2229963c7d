"""Derivatives of every kind against finite differences of the oracle, where x is large.

Arrays this large take the formulations of the platform, which those of the laws do not.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.laws import oracle

SHAPE = 40, 6, 10, 8
ACTIVATIONS = {
    "none": (None, lambda y: y),
    "relu": (jax.nn.relu, lambda y: np.maximum(y, 0)),
    "tanh": (jnp.tanh, np.tanh),
}
CASES = list(itertools.product(ACTIVATIONS, (False, True), (-1, 1)))


@pytest.fixture(params=["sums over axes", "tiles"])
def formulation(request):
    """Takes the sums on CPU in one way or the other, whatever the size of x."""
    if request.param == "tiles":
        request.getfixturevalue("small_tiles")
    return request.param


class Problem:
    """A scalar function of x, scale, bias and residual, in jaxbn and in float64 NumPy."""

    def __init__(self, activation, residual, feature_axes):
        rng = np.random.default_rng(0)
        self.activation, self.wide_activation = ACTIVATIONS[activation]
        features = SHAPE[feature_axes]
        self.bn = jaxbn.BatchNorm(feature_axes=feature_axes, activation=self.activation)
        self.weights = rng.standard_normal(SHAPE)
        # With a bias this large no element is near the kink of a ReLU.
        bias = np.where(np.arange(features) % 2, 9.0, -9.0)
        self.values = {
            "x": 3 + 2 * rng.standard_normal(SHAPE),
            "scale": 1 + 0.1 * rng.standard_normal(features),
            "bias": bias if activation == "relu" else rng.standard_normal(features),
        }
        if residual:
            self.values["residual"] = 0.1 * rng.standard_normal(SHAPE)
        self.direction = {
            name: rng.standard_normal(value.shape) for name, value in self.values.items()
        }

    def loss(self, values):
        params = jaxbn.BatchNormParams(values["scale"], values["bias"])
        _, state = self.bn.init(values["scale"].shape[0])
        residual = values.get("residual")
        y, _ = self.bn.apply(params, state, values["x"], True, residual=residual)
        return (jnp.sin(y) * self.weights.astype(y.dtype)).sum()

    def truth(self, step):
        """Returns the loss in float64, `step` along the direction."""
        values = {
            name: value + step * self.direction[name] for name, value in self.values.items()
        }
        state = {"mean": 0 * values["scale"], "var": 1 + 0 * values["scale"]}
        plain = jaxbn.BatchNorm(feature_axes=self.bn.feature_axes)
        y, _ = oracle.apply(plain, values, {**state, "weight": None}, values["x"], True)
        y = self.wide_activation(y + values.get("residual", 0))
        return (np.sin(y) * self.weights).sum()

    def arrays(self):
        narrow = lambda tree: {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()}
        return narrow(self.values), narrow(self.direction)


def dot(a, b):
    return sum(jnp.vdot(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("activation", "residual", "feature_axes"), CASES)
def test_first_and_second_derivatives_of_every_mode(
    activation, residual, feature_axes, formulation
):
    problem = Problem(activation, residual, feature_axes)
    values, along = problem.arrays()
    gradient = jax.grad(problem.loss)

    @jax.jit
    def derivatives(values, along):
        first = jax.jvp(problem.loss, (values,), (along,))[1]
        reverse, forward_over_reverse = jax.jvp(gradient, (values,), (along,))
        reverse_over_reverse = jax.grad(lambda v: dot(gradient(v), along))(values)
        seconds = dot(forward_over_reverse, along), dot(reverse_over_reverse, along)
        return (first, dot(reverse, along)), seconds

    loops = "stablehlo.while" in jax.jit(gradient).lower(values).as_text()
    # Tiles of float32 are taken with the features last.
    assert loops == (formulation == "tiles" and feature_axes == -1)
    firsts, seconds = derivatives(values, along)
    h = 1e-4
    before, at, after = (problem.truth(step) for step in (-h, 0, h))
    first, second = (after - before) / (2 * h), (after - 2 * at + before) / h**2
    np.testing.assert_allclose(firsts, first, rtol=2e-4, atol=2e-2)
    np.testing.assert_allclose(seconds, second, rtol=2e-4, atol=2e-2)


@pytest.mark.parametrize("residual", [False, True])
def test_what_an_activation_captured_is_differentiated(residual):
    bn = jaxbn.BatchNorm(epsilon=1e-12)
    params, state = bn.init(8)
    x = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), jnp.float32)
    added = 0.5 * x if residual else None

    def loss(slope):
        leaky = jaxbn.BatchNorm(
            epsilon=1e-12, activation=lambda y: jnp.where(y > 0, y, slope * y)
        )
        return leaky.apply(params, state, x, True, residual=added)[0].sum()

    wide = np.asarray(x, np.float64)
    y = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2)) + (
        0.5 * wide if residual else 0
    )
    np.testing.assert_allclose(jax.grad(loss)(0.1), y[y < 0].sum(), rtol=1e-4)


def test_a_gradient_in_bfloat16_is_rounded_once(formulation):
    bn = jaxbn.BatchNorm()
    params, state = bn.init(8)
    rng = np.random.default_rng(2)
    x, d = (jnp.asarray(rng.standard_normal(SHAPE), jnp.bfloat16) for _ in range(2))
    loss = lambda x: jnp.vdot(
        bn.apply(params, state, x, True)[0].astype(jnp.float32), d.astype(jnp.float32)
    )
    got = np.asarray(jax.jit(jax.grad(loss))(x), np.float64)
    wide, d = np.asarray(x, np.float64), np.asarray(d, np.float64)
    axes = 0, 1, 2
    inverse = 1 / np.sqrt(wide.var(axes) + bn.epsilon)
    normalized = (wide - wide.mean(axes)) * inverse
    want = inverse * (d - d.mean(axes) - normalized * (d * normalized).mean(axes))
    # The nearest of the numbers with 8 digits is at most 2^-8 off, relative to its size.
    error = np.abs(got - want) / np.maximum(np.abs(want), 1e-2)
    assert error.max() < 2**-8 * 1.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_gradients_of_a_wider_x_than_y(x64, dtype, weighted, activation):
    rng = np.random.default_rng(3)
    x, d = rng.standard_normal((2, 16, 3))
    weights = jnp.asarray(np.arange(16) % 4 > 0) if weighted else None

    def loss(bn, params, x):
        y, _ = bn.apply(params, state, x, True, weights=weights)
        return (y.astype(float) * d).sum()

    wide = jaxbn.BatchNorm(activation=activation)
    params, state = wide.init(3)
    narrow = jaxbn.BatchNorm(activation=activation, dtype=dtype)
    gradients = jax.jit(jax.grad(loss, (1, 2)), static_argnums=0)
    got, want = (gradients(bn, params, jnp.asarray(x)) for bn in (narrow, wide))
    assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, want)
    near = 30 * float(jnp.finfo(dtype).eps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=near), got, want)


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_complex_x_are_those_of_the_whole_batch(synced, weighted):
    rng = np.random.default_rng(3)
    of = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    x, along, toward = of(2, 12, 3) + 2, of(2, 12, 3), of(2, 12, 3)
    weights = (
        rng.integers(0, 3, (2, 12)).astype(np.float64) if weighted else np.ones((2, 12))
    )
    bn = jaxbn.BatchNorm(param_dtype=jnp.complex64, axis_name="d" if synced else None)
    params, state = bn.init(3)

    def normalized(x):
        w, axes = weights[..., None], (0, 1) if synced else 1
        count = w.sum(axes, keepdims=True)
        centered = x - (w * x).sum(axes, keepdims=True) / count
        var = (w * np.abs(centered) ** 2).sum(axes, keepdims=True) / count
        return centered / np.sqrt(var + bn.epsilon)

    def wide_loss(x):
        return (toward.conj() * normalized(x)).real.sum()

    def loss(x):
        given = {"weights": jnp.asarray(weights, jnp.float32)} if weighted else {}
        apply = lambda x, given: bn.apply(params, state, x, True, **given)[0]
        y = jax.vmap(apply, axis_name="d")(x, given)
        return jnp.sum(jnp.real(jnp.asarray(toward.conj(), y.dtype) * y))

    gradient = jax.grad(loss)(jnp.asarray(x, jnp.complex64))
    got = (np.asarray(gradient, np.complex128) * along).real.sum()
    h = 1e-6
    want = (wide_loss(x + h * along) - wide_loss(x - h * along)) / (2 * h)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
