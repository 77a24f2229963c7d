"""Drawn configurations and inputs: each is right against float64, or one clear error.

Not run by default: `python -m pytest tests/laws/test_drawn.py -m drawn
--hypothesis-profile=drawn` draws 2,000, `nightly` 10,000. `-k eager` runs one mode alone.
"""

import contextlib
import dataclasses
import functools
import math
import re
import traceback
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxbn
from jaxbn import convert
from jaxbn._compat import enable_x64
from tests.laws import oracle
from tests.laws.drawn import ACTIVATIONS, DEVICES, STEPS, draws
from tests.laws.drawn_modes import MODES, at, jit, looped
from tests.laws.test_laws import change

PACKAGE = Path(jaxbn.__file__).parent
# Three more: of a gradient, and of two ways to pool several batches.
NAMES = (*MODES, "grad", "gather", "reestimate")


@pytest.mark.drawn
@pytest.mark.parametrize("mode", NAMES)
def test_a_draw_is_right_or_one_clear_error(mode):
    drawn = hypothesis.settings().max_examples

    @hypothesis.settings(max_examples=-(-drawn // len(NAMES)))
    @hypothesis.given(st.data())
    def holds(data):
        check(mode, data.draw(draws(mode)))

    holds()


def check(mode, made):
    with enable_x64() if made.wide else contextlib.nullcontext():
        wrong = made.mistake
        if wrong is None and mode == "reestimate" and not fits_a_state(made):
            wrong = "reestimate"
        if wrong is not None:
            with pytest.raises(Exception) as caught:
                outcome(mode, made)
            check_clear(caught.value, wrong)
            return
        layer, params, ys, states = outcome(mode, made)
        with np.errstate(all="ignore"):
            if mode in ("gather", "reestimate"):
                check_pooled(mode, layer, made, params, ys, states)
            else:
                check_steps(layer, made, params, ys, states)
            if mode == "grad" and np.abs(made.xs.astype(float)).max(initial=0) < 1e9:
                check_gradient(layer, made, params, states[0])


def check_clear(error, mistake):
    """Asserts that an error is one of the package's own, with its fact and its remedy."""
    assert isinstance(error, TypeError | ValueError | NameError), repr(error)
    where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert PACKAGE in where.parents, f"{mistake}: raised in {where}: {error!r}"
    assert re.search(r"[.:?] [A-Z].*[.?]$", str(error), re.DOTALL), f"{mistake}: {error}"


def outcome(mode, made):
    """Returns the layer, its params, what comes out in each step, and the states."""
    layer = made.layer()
    params, state = started(layer, made)
    flag = jnp.full(STEPS, made.training == "traced")
    inputs = jax.tree.map(jnp.asarray, (made.xs, flag, made.weights, made.residual))
    if mode in ("gather", "reestimate"):
        return layer, params, *pooled(mode, layer, made, params, state, inputs)
    run = functools.partial(step, layer, made, params)
    return layer, params, *MODES.get(mode, jit)(run, made, state, inputs)


def step(layer, made, params, state, x, flag, weights, residual):
    training = flag if made.training in ("traced", "traced_inference") else made.training
    given = {"weights": weights, "residual": residual, **made.options}
    return layer.apply(params, state, x, training, **given)


def started(layer, made):
    """Returns params away from 1 and 0, and a state likewise."""
    features = made.features
    if (made.mistake or "").startswith("axis_"):
        layer, features = change(layer, feature_axes=-1), features[:1]
    params, state = layer.init(features if len(features) > 1 else features[0])
    moved = np.linspace(0.5, 1.5, math.prod(features)).reshape(features)
    return jax.tree.map(lambda leaf: leaf + moved.astype(leaf.dtype), params), state


def pooled(mode, layer, made, params, state, inputs):
    run = jax.jit(functools.partial(step, jaxbn.Gather(layer), made, params))
    if mode == "gather":
        ys, states = looped(run, jaxbn.gather(state), inputs)
        return ys, [state, jaxbn.track_gathered(states[-1])]
    batches = [at(inputs, i) for i in range(STEPS)]
    after = jaxbn.reestimate(lambda state, batch: run(state, *batch)[1], state, batches)
    return [], [state, after]


def as_seen(layer, made):
    """Returns the layer as the oracle is to see it, and how it finds the rows, and back.

    It knows no overrides, and ghost batches of all devices as one.
    """
    if "momentum" in made.options:
        layer = change(layer, momentum=made.options["momentum"])
    if layer.axis_name is None or not isinstance(layer, jaxbn.GhostBatchNorm):
        return layer, slice(None), slice(None)
    size, rows = layer.virtual_batch_size, np.arange(made.xs.shape[1])
    if layer.layout == "contiguous":
        rows = rows.reshape(DEVICES, -1, size).swapaxes(0, 1).ravel()
    whole = dataclasses.replace(layer, virtual_batch_size=DEVICES * size)
    return whole, rows, np.argsort(rows)


def expected(layer, made, params, state, i, x, held=None):
    """Returns y after the activation and before, and the state, in float64."""
    seen, rows, back = as_seen(layer, made)
    weights = None if made.weights is None else made.weights[i][rows]
    training = made.training in (True, "traced")
    pair = made.options.get("adjustment")
    inner, after = oracle.apply(
        seen, params, state, x[rows], training, weights, held, adjustment=pair
    )
    inner = inner[back]
    if made.residual is not None:
        inner = inner + made.residual[i].astype(float)
    return ACTIVATIONS[layer.activation](inner), inner, after


def check_steps(layer, made, params, ys, states):
    """Compares each step with the truth, which starts at the state that was there."""
    for i, y in enumerate(ys):
        x, state = made.xs[i].astype(float), oracle.tree(states[i])
        want, inner, after = expected(layer, made, oracle.tree(params), state, i, x)
        check_y(layer, made, y, want, inner, x)
        check_state(states[i], states[i + 1], after, x)


def check_y(layer, made, y, want, inner, x):
    kind = jnp.finfo(layer.dtype or made.xs.dtype)
    assert (y.dtype, y.shape) == (kind.dtype, want.shape)
    y, ulp, largest = np.asarray(y, float), float(kind.eps), np.abs(x).max(initial=0)
    size = 1e-5 * (np.abs(inner) + np.abs(want) + 3) + 4 * ulp * np.abs(want)
    if isinstance(layer, convert.EmaBatchNorm):
        # It subtracts a mean that is a state, and so rounded.
        size += 1e-5 * np.abs(np.nan_to_num(x)) / np.sqrt(layer.bn.epsilon)
    if layer.activation is not None and layer.ghost_batches is not None:
        # On a reshaped x the activation is that of the rounded y, in its dtype.
        size += 8 * ulp * (1 + np.abs(inner))
    near = np.abs(y - want) <= size
    # Where sums overflow, or y itself, there is no right value.
    beyond = np.maximum(np.abs(want), np.abs(inner)) > 0.9 * float(kind.max)
    beyond |= np.abs(inner) > 1e37 if made.xs.dtype != float else False
    beyond |= largest > (1e18 if made.xs.dtype != float else 1e150)
    beyond |= ~np.isfinite(want)
    assert (near | beyond).all(), (y, want)


def check_state(before, after, want, x, rounded=0.0):
    """Compares states; `rounded` is what the variance loses to rounded means."""
    largest = np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0)
    for name, value in after._asdict().items():
        old = getattr(before, name)
        if value is None:
            assert old is None
            continue
        assert (value.shape, value.dtype) == (old.shape, old.dtype), name
        value, kept = np.asarray(value, float), np.asarray(old, float)
        assert np.isfinite(value).all(), name
        size = 2e-5 * np.abs(want[name]) + 2e-6 * (largest if "mean" in name else 1e-3)
        if name == "var":
            size = size + rounded + (1e-7 * largest) ** 2
        elif "std" in name:
            size = size + 1e-7 * largest
        # What fits no float32 leaves the feature as it was.
        small = float(jnp.finfo(old.dtype).max) ** 0.5 / 10
        stays = (value == kept) & (largest > small)
        assert (stays | (np.abs(value - want[name]) <= size)).all(), (name, value, want)


def check_gradient(layer, made, params, state):
    """Compares the slope along one direction with a difference quotient in float64."""
    x = made.xs[0]
    if not np.isfinite(x.astype(float)).all():
        return
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=x.shape)
    inputs = jax.tree.map(jnp.asarray, (made.weights, made.residual))
    flag = jnp.asarray(made.training == "traced")

    def loss(params, x):
        y, _ = step(layer, made, params, state, x, flag, *at(inputs, 0))
        return (y * cotangent.astype(y.dtype)).sum()

    by_params, by_x = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(x))
    assert by_x.dtype == x.dtype
    wide, before, far = oracle.tree(params), oracle.tree(state), x.astype(float)
    reduced = oracle.reduced(far, layer.feature_axes)
    spread = far.std(reduced, keepdims=True) if far.size else 1.0
    if layer.ghost_batches is not None:
        spread = np.minimum(spread, 1.0)  # a ghost batch may vary less than all of x
    moves = {n: rng.normal(size=v.shape) for n, v in wide.items() if v is not None}
    along = rng.normal(size=x.shape) * np.where(spread > 0, spread, 1e-3)

    def true_loss(h):
        moved = {n: None if v is None else v + h * moves[n] for n, v in wide.items()}
        y, *_ = expected(layer, made, moved, before, 0, far + h * along, (far, before))
        return (y * cotangent).sum()

    want = (true_loss(1e-5) - true_loss(-1e-5)) / 2e-5
    terms = [np.asarray(by_x, float) * along]
    terms += [np.asarray(getattr(by_params, n), float) * move for n, move in moves.items()]
    size = sum(np.abs(term).sum() for term in terms) + np.abs(cotangent).sum()
    kinds = x.dtype, layer.dtype or x.dtype, oracle.settings(layer).param_dtype
    ulp = max(float(jnp.finfo(kind).eps) for kind in kinds)
    got = sum(term.sum() for term in terms)
    assert abs(got - want) <= (4 * ulp + 2e-4) * size, (got, want, size)


def whole_batch(made, axes):
    """Returns the moments of the batches of all steps taken as one."""
    weights = [None] * STEPS if made.weights is None else made.weights
    xs = made.xs.astype(float)
    parts = [oracle.moments(x, axes, w) for x, w in zip(xs, weights, strict=True)]
    reduced = oracle.reduced(xs[0], axes)
    return [np.squeeze(array, reduced) for array in oracle.merge(None, parts)]


def check_pooled(mode, layer, made, params, ys, states):
    before, after = states
    start, wide = oracle.tree(before), oracle.tree(params)
    for i, y in enumerate(ys):
        x = made.xs[i].astype(float)
        want, inner, _ = expected(layer, made, wide, start, i, x)
        check_y(layer, made, y, want, inner, x)
    mean, var, count = whole_batch(made, layer.feature_axes)
    # The means of the batches that are pooled are rounded to those of a state.
    rounded = 2 * np.sqrt(var) * float(jnp.finfo(before.mean.dtype).eps) * np.abs(mean)
    if mode == "reestimate":
        off = np.asarray(after.var, float) - var
        assert (np.abs(off) <= 2e-5 * var + rounded + 2e-9).all(), (after.var, var)
        want = {**start, "mean": mean, "var": np.asarray(after.var, float)}
        after = after._replace(**{n: getattr(before, n) for n in after._fields[2:]})
    elif made.training in (True, "traced"):
        want = oracle.tracked(as_seen(layer, made)[0], start, mean, var, count)
    else:
        want = start
    check_state(before, after, want, made.xs.astype(float), rounded)


def fits_a_state(made):
    """Tells whether every feature was seen, and its moments are numbers of the state."""
    with np.errstate(all="ignore"):
        mean, var, count = whole_batch(made, made.settings["feature_axes"])
        wide = jnp.dtype(made.settings["param_dtype"]).itemsize == 8
        x = made.xs.astype(float)
        # What is not finite has no weight, or else the moments are not finite.
        largest = np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0)
        small = largest < (1e150 if wide else 1e18)
    return bool(small and np.isfinite(mean + var).all() and (count > 0).all())
