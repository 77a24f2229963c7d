"""Runs the recorded cases of TensorFlow's functions: moments, averages, dropout."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import tf1
from tests.golden_runners.tf1_checks import Traced, arrays, check, known, near


def run_moments(case):
    (step,) = case.steps
    known(
        step, "op", "x", "shift", "frequency_weights", "count", "mean_ss", "variance_ss",
        "mean", "variance", "dmean", "dvariance", "grads",
    )  # fmt: skip
    assert step["op"] == case.meta["api"]
    given = ("x", "shift", "frequency_weights", "dmean", "dvariance")
    given = arrays(case, {name: step[name] for name in given if name in step})
    cotangents = given.pop("dmean"), given.pop("dvariance")
    x = given.pop("x")
    # TensorFlow takes both spellings.
    given |= {{"keepdims": "keep_dims"}.get(k, k): v for k, v in case.kwargs.items()}

    def sums(x):
        return tf1.sufficient_statistics(x, **given)

    moments = {
        "tf.nn.moments": lambda x: tf1.moments(x, **given),
        "tf.nn.weighted_moments": lambda x: tf1.weighted_moments(x, **given),
        "tf.nn.sufficient_statistics": lambda x: tf1.normalize_moments(*sums(x)),
    }[step["op"]]
    (mean, variance), backward = jax.vjp(moments, x)
    assert mean.dtype == variance.dtype == x.dtype
    # The size of what is added up, as much of it may cancel.
    size, count, spread = np.abs(x).max(), x.size // mean.size, 0.0
    if step["op"] == "tf.nn.sufficient_statistics":
        spread = size**2
        for name, value in zip(("count", "mean_ss", "variance_ss"), sums(x), strict=False):
            near(case, value, step[name], name, count * size)
    near(case, mean, step["mean"], "mean", size)
    near(case, variance, step["variance"], "variance", spread)
    (by_x,) = backward(cotangents)
    terms = {"x": size * np.abs(cotangents[1]).max() / count}
    check(case, {"x": by_x}, step["grads"], "gradient of", terms)


def run_normalization(case):
    (step,) = case.steps
    known(step, "op", "x", "dy", "y", "inputs", "none", "grads", "batch_mean",
          "batch_variance")  # fmt: skip
    assert step["op"] == case.meta["api"]
    names = {"mean", "variance", "offset", "scale"}
    inputs = arrays(case, {"x": step["x"], **step["inputs"]})
    assert names == set(step["inputs"]) | set(step["none"])
    fused = step["op"] == "tf.nn.fused_batch_norm"

    def normalize(inputs):
        given = {**dict.fromkeys(names), **inputs, **case.kwargs}
        if not fused:
            return tf1.nn_batch_normalization(**given), None
        y, *moments = tf1.fused_batch_norm(**given)
        return y, moments

    y, backward, moments = jax.vjp(normalize, inputs, has_aux=True)
    assert y.dtype == inputs["x"].dtype
    near(case, y, step["y"], "y")
    dy = jnp.asarray(case[step["dy"]])
    (gradients,) = backward(dy)
    for name, key in step["grads"].items():
        total = np.abs(dy).sum() / inputs[name].size
        near(case, gradients[name], key, f"gradient of {name}", total)
    # Of the moments that it is given, the fused operation has no gradient recorded.
    unused = {"mean", "variance"} if fused else set()
    assert set(gradients) - set(step["grads"]) <= unused
    if "batch_mean" in step:
        near(case, moments[0], step["batch_mean"], "batch_mean")
        near(case, moments[1], step["batch_variance"], "batch_variance")


def run_average(case):
    """Runs a moving average, of a class or assigned, of a variable or a tensor."""
    kwargs, recorded = dict(case.kwargs), case.meta["init_state"]
    per_step = kwargs.get("num_updates") == "per_step"
    start = jnp.asarray(case[recorded["average"]])
    if case.meta["api"] == "moving_averages.assign_moving_average":
        debiases = kwargs.get("zero_debias", True)
        zeros = (jnp.zeros_like(start), jnp.zeros(())) if debiases else ()
        state = tf1.MovingAverage(start, *zeros)

        def update(training, state, value, fed):
            return tf1.assign_moving_average(state, value, **kwargs)
    else:
        tensors = {"tensor": True, "variable": False}[case.meta["target"]]
        first = start if tensors else jnp.asarray(case[case.meta["initial_value"]])
        state = tf1.ExponentialMovingAverage(**kwargs).init(first, tensors)

        def update(training, state, value, fed):
            return tf1.ExponentialMovingAverage(**{**kwargs, **fed}).apply(state, value)

    traced = Traced(update, placeholder=True)
    check_average(case, state, recorded, "initial")
    for index, step in enumerate(case.steps):
        known(step, "op", "value", "num_updates", "state_after")
        assert step["op"] == "ema_update", step["op"]
        assert per_step == ("num_updates" in step)
        fed = {"num_updates": step["num_updates"]} if per_step else {}
        state = traced(True, state, jnp.asarray(case[step["value"]]), fed)
        check_average(case, state, step["state_after"], f"step {index}:")
    traced.check()


def check_average(case, state, keys, what):
    got = {name: value for name, value in state._asdict().items() if value is not None}
    check(case, got, keys, what)


def run_dropout(case):
    """Compares how much is kept and how it is scaled, as masks are random."""
    (step,) = case.steps
    known(step, "op", "training", "x", "y", "dy", "grads", "kept_counts", "n_runs")
    assert step["op"] == "dropout"
    assert step["training"] is True
    x, dy = jnp.asarray(case[step["x"]]), jnp.asarray(case[step["dy"]])
    assert (x != 0).all()

    # Another generator draws other masks, whatever the seed.
    kwargs = {k: v for k, v in case.kwargs.items() if k not in ("seed", "name")}

    @jax.vmap
    def draw(key):
        y, backward = jax.vjp(lambda x: tf1.dropout(key, x, **kwargs), x)
        return y, backward(dy)[0]

    ys, gradients = map(
        np.asarray, draw(jax.random.split(jax.random.key(0), step["n_runs"]))
    )
    masks, keep = ys != 0, case.meta["keep_prob"]
    np.testing.assert_allclose(ys, np.where(masks, x / keep, 0), rtol=1e-6)
    np.testing.assert_allclose(gradients, np.where(masks, dy / keep, 0), rtol=1e-6)
    recorded = case[step["y"]]
    np.testing.assert_allclose(recorded, np.where(recorded != 0, x / keep, 0), rtol=1e-6)

    noise_shape = case.meta["noise_shape"] or x.shape
    for axis, noise in enumerate(noise_shape, start=1):
        if noise == 1:
            assert (masks == masks.take([0], axis)).all(), f"axis {axis - 1} is not shared"
    # Five standard deviations of what independent draws differ by.
    draws = step["n_runs"] * np.prod([noise or size for noise, size in zip(
        noise_shape, x.shape, strict=True)])  # fmt: skip
    margin = 5 * np.sqrt(keep * (1 - keep) / draws)
    assert abs(masks.mean() - keep) <= margin
    assert abs(case[step["kept_counts"]].mean() / x.size - masks.mean()) <= 2 * margin
