"""Runs the cases that were computed in 80-bit floating point with NumPy alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from tests.golden_runners.case import FLOOR, assert_near


def run(case):
    """Runs every step of a case; an operation that is not known is an error."""
    operations = {"truth": run_batch, "merge": run_merge, "ema_long": run_average}
    for step in case.steps:
        operations[step["op"]](case, step)


def run_batch(case, step):
    assert set(case.kwargs) == {"epsilon", "channel_axis"}, case.kwargs
    bn = jaxbn.BatchNorm(
        feature_axes=case.kwargs["channel_axis"],
        epsilon=case.kwargs["epsilon"],
        dtype=jnp.float32,
        ddof=1,
        momentum=0.0,
    )
    x = jnp.asarray(case[step["x"]]).astype(case.meta["dtype"])
    weights = case.factor(step)
    weights = None if weights is None else jnp.asarray(weights)
    valid = np.asarray(case[step["mask"]]) if step["valid_only"] else True
    dy = jnp.asarray(np.where(valid, case[step["dy"]], 0), jnp.float32)
    params, state = bn.init(x.shape[-1])
    params = params._replace(
        scale=jnp.asarray(case[step["gamma"]], jnp.float32),
        bias=jnp.asarray(case[step["beta"]], jnp.float32),
    )

    batch = jaxbn.moments(x, weights=weights)
    _check_moments(case, step, batch)

    def forward(params, x):
        return bn.apply(params, state, x, True, weights=weights)

    (y, backward, state) = jax.vjp(forward, params, x, has_aux=True)
    by_params, by_x = backward(dy)
    # Where the variance overflows float32 only finiteness is a fair demand.
    fair = case[step["var"]] < np.finfo(np.float32).max
    fair &= np.isfinite(np.asarray(batch.var))
    for name, array in {"y": y, "x": by_x, "scale": by_params.scale}.items():
        assert np.isfinite(np.asarray(array, np.float64)).all(), name
    _check_state(case, step, state, fair)

    # What a plain two-pass float32 computation loses through a large mean, we may too.
    reachable = np.asarray(step["achievable"]["two_pass_f32"]["xhat_abs_err"], np.float64)
    tolerance = FLOOR["float32"] + 4 * np.nan_to_num(reachable).max()
    near = functools.partial(assert_near, tolerance=tolerance)
    near(y, case[step["y"]], what="y", where=fair & valid)
    grads = step["grads"]
    terms = np.abs(dy).max()
    for name, by_param in {"gamma": by_params.scale, "beta": by_params.bias}.items():
        near(by_param, case[grads[name]], what=f"{name} gradient", where=fair, terms=terms)
    slope = np.abs(case[step["gamma"]]) / np.sqrt(case[step["var"]] + bn.epsilon)
    terms = slope * np.abs(dy).max()
    assert_near(
        by_x, case[grads["x"]], max(tolerance, case.tolerance), "x gradient", fair, terms
    )


def _check_moments(case, step, batch):
    batch = jaxbn.Moments(*(np.asarray(array, np.float64) for array in batch))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    near(batch.count, case[step["total_weight"]])
    std = np.sqrt(case[step["var"]])
    rounding = 1e-6 * std + np.spacing(np.abs(case[step["mean"]]).astype(np.float32))
    assert (np.abs(batch.mean - case[step["mean"]]) <= rounding).all()
    # A variance below the smallest normal float32 is flushed to 0 by most hardware.
    tiny = np.finfo(np.float32).tiny
    fair = case[step["var"]] < np.finfo(np.float32).max
    constant = np.square(rounding)
    np.testing.assert_array_less(
        np.abs(batch.var - case[step["var"]])[fair],
        (1e-5 * case[step["var"]] + constant + tiny)[fair],
    )


def _check_state(case, step, state, fair):
    want_var = np.where(fair, case[step["var_unbiased"]], 1)
    np.testing.assert_allclose(state.var, want_var, rtol=1e-5, atol=1e-6)
    want_mean = np.where(fair, case[step["mean"]], 0)
    np.testing.assert_allclose(state.mean, want_mean, rtol=1e-6, atol=1e-5)


def run_merge(case, step):
    parts = [
        jaxbn.Moments(
            mean=jnp.asarray(mean, jnp.float32),
            var=jnp.asarray(var, jnp.float32),
            count=jnp.full(mean.shape, count, jnp.float32),
        )
        for mean, var, count in zip(
            case[step["shard_mean"]],
            case[step["shard_var"]],
            case[step["counts"]],
            strict=True,
        )
    ]
    for order in (parts, parts[::-1]):
        total = functools.reduce(jaxbn.merge_moments, order)
        np.testing.assert_allclose(total.count, case[step["counts"]].sum())
        np.testing.assert_allclose(total.mean, case[step["mean"]], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(total.var, case[step["var"]], rtol=5e-4)
    whole = jaxbn.moments(jnp.asarray(case[step["x"]]))
    np.testing.assert_allclose(whole.var, case[step["var"]], rtol=1e-5)


def run_average(case, step):
    values = jnp.asarray(case[step["values"]])
    decay, start = case.kwargs["decay"], case.kwargs["init"]

    def averages(bn):
        _, state = bn.init(values.shape[-1])
        state = state._replace(mean=jnp.full_like(state.mean, start))

        def body(state, value):
            batch = jaxbn.Moments(value, jnp.ones_like(value), jnp.ones_like(value))
            state = jaxbn.update_running(state, batch, momentum=decay)
            return state, state.mean

        return jax.lax.scan(body, state, values)[1]

    at = np.asarray(step["at"]) - 1
    for bn, key in (
        (jaxbn.BatchNorm(), "average"),
        (jaxbn.BatchNorm(debias=True), "debiased"),
    ):
        np.testing.assert_allclose(averages(bn)[at], case[step[key]], rtol=1e-5)
