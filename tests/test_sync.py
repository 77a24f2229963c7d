"""A batch spread over devices: equal to the whole batch in every parallel style."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.test_laws import change

DEVICES, ROWS = 8, 6


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))


# A style is `run(layer, params, state, x, weights, dy)` with a leading axis of devices, and
# returns y, the state, and the gradients of sum(y dy) by params (of the whole) and by x.


def value_and_gradients(layer, params, state, x, weights, dy):
    def loss(params, x):
        options = {} if weights is None else {"weights": weights}
        y, after = layer.apply(params, state, x, True, **options)
        return (y * dy).sum(), (y, after)

    (by_params, by_x), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, after, by_params, by_x


def by_pmap(layer, params, state, x, weights, dy):
    run = functools.partial(value_and_gradients, change(layer, axis_name="d"))
    y, after, by_params, by_x = jax.pmap(run, axis_name="d", in_axes=(None, None, 0, 0, 0))(
        params, state, x, weights, dy
    )
    return replicated(y, after, total(by_params), by_x)


def by_vmap(layer, params, state, x, weights, dy):
    run = functools.partial(value_and_gradients, change(layer, axis_name="d"))
    # Without a gradient inside, the state is the same for all, and typed so.
    forward = jax.vmap(
        lambda x, w: run(params, state, x, w, jnp.ones_like(x))[1],
        axis_name="d",
        out_axes=None,
    )
    after = forward(x, weights)
    y, _, by_params, by_x = jax.vmap(run, axis_name="d", in_axes=(None, None, 0, 0, 0))(
        params, state, x, weights, dy
    )
    return y, after, total(by_params), by_x


def by_shard_map(layer, params, state, x, weights, dy, check_vma=True):
    def shard(params, state, x, weights, dy):
        x, weights, dy = jax.tree.map(lambda leaf: leaf[0], (x, weights, dy))
        y, after, by_params, by_x = value_and_gradients(
            change(layer, axis_name="d"), params, state, x, weights, dy
        )
        if not check_vma:
            by_params = jax.lax.psum(by_params, "d")
        return y[None], after, by_params, by_x[None]

    return jax.jit(
        jax.shard_map(
            shard,
            mesh=mesh(),
            in_specs=(P(), P(), P("d"), P("d"), P("d")),
            out_specs=(P("d"), P(), P(), P("d")),
            check_vma=check_vma,
        )
    )(params, state, x, weights, dy)


def by_unchecked_shard_map(*arguments):
    return by_shard_map(*arguments, check_vma=False)


def by_sharded_jit(layer, params, state, x, weights, dy, kind=AxisType.Auto):
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (x, weights, dy))
    with jax.set_mesh(mesh(kind)):
        spread = jax.device_put(flat, NamedSharding(mesh(kind), P("d")))
        whole = jax.device_put((params, state), NamedSharding(mesh(kind), P()))
        y, after, by_params, by_x = jax.jit(functools.partial(value_and_gradients, layer))(
            *whole, *spread
        )
        assert y.sharding.spec[0] == "d"
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(after))
        return y.reshape(x.shape), after, by_params, by_x.reshape(x.shape)


def by_explicit_jit(layer, params, state, x, weights, dy):
    arguments = layer, params, state, x, weights, dy, AxisType.Explicit
    return jax.tree.map(np.asarray, by_sharded_jit_explicit(*arguments))


def by_sharded_jit_explicit(layer, params, state, x, weights, dy, kind):
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (x, weights, dy))
    explicit = mesh(kind)
    with jax.set_mesh(explicit):
        spread = jax.device_put(flat, NamedSharding(explicit, P("d")))
        whole = jax.device_put((params, state), NamedSharding(explicit, P()))
        traces = []

        @jax.jit
        def step(*arguments):
            traces.append(arguments)
            return value_and_gradients(layer, *arguments)

        y, after, by_params, by_x = step(*whole, *spread)
        step(whole[0], after, *spread)
        assert len(traces) == 1
    return np.reshape(y, x.shape), after, by_params, np.reshape(by_x, x.shape)


def total(by_params):
    return jax.tree.map(lambda leaf: leaf.sum(0), by_params)


def replicated(y, after, by_params, by_x):
    for leaf in jax.tree.leaves(after):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    return y, jax.tree.map(lambda leaf: leaf[0], after), by_params, by_x


STYLES = {
    style.__name__: style
    for style in (
        by_pmap,
        by_vmap,
        by_shard_map,
        by_unchecked_shard_map,
        by_sharded_jit,
        by_explicit_jit,
    )
}
LAYERS = {
    "default": (jaxbn.BatchNorm(), (3,)),
    "channels_first": (jaxbn.BatchNorm(feature_axes=1, ddof=1), (3, 2)),
    "cumulative": (jaxbn.BatchNorm(momentum=None, use_bias=False), (2, 3)),
    "renorm": (jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.7)), (3,)),
}
SHARDS = ("full", "uneven", "masked", "one_empty", "weighted")


def draw(kind, shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(DEVICES, ROWS, *shape)) * 2 + np.arange(DEVICES).reshape(
        -1, 1, *[1] * len(shape)
    )
    weights = {
        "full": None,
        "uneven": np.arange(ROWS) < np.array([6, 1, 5, 2, 6, 3, 4, 1])[:, None],
        "masked": rng.random((DEVICES, ROWS)) < 0.6,
        "one_empty": np.arange(DEVICES)[:, None] * np.ones(ROWS) > 0,
        "weighted": rng.choice([0.0, 0.5, 3.0], (DEVICES, ROWS)),
    }[kind]
    dy = rng.normal(size=x.shape)
    as_float = functools.partial(jnp.asarray, dtype=jnp.float32)
    return as_float(x), None if weights is None else as_float(weights), as_float(dy)


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("case", LAYERS)
def test_a_spread_batch_is_the_whole_batch(case, style, shards):
    layer, shape = LAYERS[case]
    x, weights, dy = draw(shards, shape)
    params, state = layer.init(3)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (x, weights, dy))
    want = value_and_gradients(layer, params, state, *flat)
    got = STYLES[style](layer, params, state, x, weights, dy)
    y, after, by_params, by_x = got
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    near(y, want[0].reshape(x.shape))
    jax.tree.map(near, after, want[1])
    jax.tree.map(functools.partial(near, atol=1e-4), by_params, want[2])
    near(by_x, want[3].reshape(x.shape))


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_variance_over_devices_keeps_its_digits(spread, weighted):
    rng = np.random.default_rng(0)
    x = 1e4 + spread * rng.normal(size=(DEVICES, 1, 3)) + rng.normal(size=(DEVICES, 512, 3))
    x = x.astype(np.float32)
    weights = np.ones((DEVICES, 512), np.float32)
    if weighted:
        weights = rng.choice([0.0, 1.0, 2.5, 1e-3, 1e4], weights.shape).astype(np.float32)
        weights[3] = 0
    bn = jaxbn.BatchNorm(axis_name="d", momentum=0.0)
    params, state = bn.init(3)
    run = jax.pmap(
        lambda x, w: bn.apply(params, state, x, True, weights=w)[1], axis_name="d"
    )
    wide, w = x.astype(np.float64).reshape(-1, 3), weights.astype(np.float64).reshape(-1, 1)
    mean = (w * wide).sum(0) / w.sum()
    var = (w * (wide - mean) ** 2).sum(0) / w.sum()
    np.testing.assert_allclose(run(x, weights).var[0], var, rtol=1e-5)


GROUPS = {"equal": ((0, 1, 2, 3), (4, 5, 6, 7)), "unequal": ((5, 0, 1), (2, 3, 4, 6, 7))}


@pytest.mark.parametrize("style", [by_pmap, by_shard_map, by_unchecked_shard_map])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_share_statistics_among_themselves(groups, style):
    members = GROUPS[groups]
    x, weights, _ = draw("masked", (3,))
    layer = jaxbn.BatchNorm(axis_name="d", axis_index_groups=members, momentum=0.5)
    params, state = layer.init(3)

    def run(x, weights):
        y, after = layer.apply(params, state, x, True, weights=weights)
        return y, after

    if style is by_pmap:
        y, after = jax.pmap(run, axis_name="d")(x, weights)
    else:
        mapped = jax.shard_map(
            lambda x, w: jax.tree.map(lambda leaf: leaf[None], run(x[0], w[0])),
            mesh=mesh(),
            in_specs=P("d"),
            out_specs=P("d"),
            check_vma=style is by_shard_map,
        )
        y, after = jax.jit(mapped)(x, weights)
    alone = jaxbn.BatchNorm(momentum=0.5)
    for group in map(np.array, members):
        want, stats = alone.apply(
            params, state, x[group].reshape(-1, 3), True, weights=weights[group].reshape(-1)
        )
        np.testing.assert_allclose(y[group].reshape(-1, 3), want, rtol=1e-4, atol=1e-5)
        for device in group:
            np.testing.assert_allclose(after.mean[device], stats.mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(after.var[device], stats.var, rtol=1e-5)


def collectives(jaxpr):
    """Counts the sums over devices in a jaxpr, at any depth."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name.startswith("psum")
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += collectives(inner)
    return found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("remat", [False, True])
def test_one_collective_forward_and_one_backward(weighted, remat):
    layer = jaxbn.BatchNorm(axis_name="d")
    params, state = layer.init(3)
    x, w = jnp.ones((4, 3)), jnp.ones(4) if weighted else None

    def loss(params, x):
        return jnp.square(layer.apply(params, state, x, True, weights=w)[0]).sum()

    for style in ("environment", "shard_map"):
        for function, want in ((loss, 1), (jax.grad(loss, (0, 1)), 2)):
            if style == "environment":
                jaxpr = jax.make_jaxpr(function, axis_env=[("d", DEVICES)])(params, x)
            else:
                local = jax.shard_map(
                    lambda p, x, f=function: jax.tree.map(jnp.atleast_1d, f(p, x)),
                    mesh=mesh(),
                    in_specs=(P(), P("d")),
                    out_specs=P("d") if want == 1 else (P(), P("d")),
                )
                jaxpr = jax.make_jaxpr(local)(params, jnp.ones((8 * 4, 3)))
            assert collectives(jaxpr.jaxpr) == want, (style, want)


def test_a_traced_mode_inside_shard_map():
    layer = jaxbn.BatchNorm(axis_name="d")
    params, state = layer.init(3)
    x, _, _ = draw("full", (3,))
    run = jax.jit(
        jax.shard_map(
            lambda t, x: layer.apply(params, state, x, t),
            mesh=mesh(),
            in_specs=(P(), P("d")),
            out_specs=(P("d"), P()),
        )
    )
    flat = x.reshape(-1, 3)
    for training in (True, False):
        y, after = run(jnp.array(training), flat)
        want, stats = jaxbn.BatchNorm().apply(params, state, flat, training)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after.var, stats.var, rtol=1e-5)


def test_ghost_batches_span_devices():
    layer = jaxbn.GhostBatchNorm(jaxbn.BatchNorm(axis_name="d", momentum=0.5), 3)
    x, _, _ = draw("full", (3,))
    params, state = layer.init(3)
    y, after = jax.pmap(lambda x: layer.apply(params, state, x, True), axis_name="d")(x)
    plain = jaxbn.BatchNorm(momentum=0.5)
    for rows in (slice(0, 3), slice(3, 6)):
        want, _ = plain.apply(params, state, x[:, rows].reshape(-1, 3), True)
        np.testing.assert_allclose(y[:, rows].reshape(-1, 3), want, rtol=1e-5, atol=1e-5)
    _, stats = plain.apply(params, state, x.reshape(-1, 3), True)
    np.testing.assert_allclose(after.var[0], stats.var, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("state_spec", [P(), P("m")])
def test_the_state_of_a_channel_sharded_model_keeps_its_type(kind, state_spec):
    grid = jax.make_mesh((4, 2), ("d", "m"), axis_types=(kind, kind))
    x = np.random.default_rng(0).normal(size=(8, 5, 4)).astype(np.float32) + 3
    for layer in (jaxbn.BatchNorm(), jaxbn.BatchRenorm()):
        params, state = layer.init(4)
        want, stats = layer.apply(params, state, x, True)
        with jax.set_mesh(grid):
            spread = jax.device_put(x, NamedSharding(grid, P("d", None, "m")))
            params, state = jax.device_put((params, state), NamedSharding(grid, state_spec))

            @jax.jit
            def steps(params, state, x, layer=layer):
                def body(state, _):
                    y, state = layer.apply(params, state, x, True)
                    return state, y

                return jax.lax.scan(body, state, length=1)

            after, y = steps(params, state, spread)
            np.testing.assert_allclose(y[0], want, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(after.var, stats.var, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_ghost_batches_within_a_shard_cost_no_collective(kind, size):
    layer = jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), size)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    params, state = layer.init(4)
    want, _ = layer.apply(params, state, x, True)

    def loss(x, params):
        y, _ = layer.apply(params, state, x, True)
        return (y**3).sum(), y

    with jax.set_mesh(mesh(kind)):
        spread = jax.device_put(x, NamedSharding(mesh(kind), P("d")))
        params = jax.device_put(params, NamedSharding(mesh(kind), P()))
        run = jax.jit(jax.grad(loss, has_aux=True)).lower(spread, params).compile()
        np.testing.assert_allclose(run(spread, params)[1], want, rtol=1e-4, atol=1e-5)
    spans = size > 8
    assert ("all-reduce(" in run.as_text() or "all-to-all(" in run.as_text()) == spans


def test_replicas_that_tracked_alone_pool_into_one_state():
    x, _, _ = draw("full", (3,))
    rows = np.array([6, 1, 5, 2, 6, 3, 4, 0])
    weights = (np.arange(ROWS) < rows[:, None]).astype(np.float32)
    flat, flat_weights = x.reshape(-1, 3), weights.reshape(-1)
    for layer in (jaxbn.BatchNorm(momentum=0.0), jaxbn.BatchNorm(momentum=None)):
        params, state = layer.init(3)

        def alone(x, w, n, layer=layer, params=params, state=state):
            _, after = layer.apply(params, state, x, True, weights=w)
            return after, jaxbn.sync_state(after, "d", weight=n)

        after, pooled = jax.pmap(alone, axis_name="d")(x, weights, rows.astype(np.float32))
        assert jaxbn.replica_differences(after, axis=0).keys() >= {".mean", ".var"}
        assert jaxbn.replica_differences(pooled, axis=0) == {}
        _, want = layer.apply(params, state, flat, True, weights=flat_weights)
        first = jax.tree.map(lambda leaf: leaf[0], pooled)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first, want)


def test_replicas_of_batch_renormalization_pool_their_deviations():
    layer = jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.0), momentum=0.0)
    params, state = layer.init(3)
    x, _, _ = draw("full", (3,))
    run = lambda x: jaxbn.sync_state(layer.apply(params, state, x, True)[1], "d")
    pooled = jax.tree.map(lambda leaf: leaf[0], jax.pmap(run, axis_name="d")(x))
    _, want = layer.apply(params, state, x.reshape(-1, 3), True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), pooled, want)


def test_copies_of_a_replicated_array_are_compared():
    broken = jax.shard_map(
        lambda x: x.mean(0), mesh=mesh(), in_specs=P("d"), out_specs=P(), check_vma=False
    )(jnp.arange(8.0)[:, None])
    assert jaxbn.replica_differences({"mean": broken}) == {"['mean']": 7.0}
    assert jaxbn.replica_differences(jnp.array([[np.nan], [np.nan]]), axis=0) == {}
    assert jaxbn.replica_differences(jnp.array([[np.nan], [1.0]]), axis=0) == {"": np.inf}
    with pytest.raises(TypeError, match="float"):
        jaxbn.replica_differences({"mean": 1.0})
    with pytest.raises(TypeError, match="dict"):
        jax.vmap(lambda x: jaxbn.sync_state({"mean": x}, "d"), axis_name="d")(jnp.ones(2))


def test_mistakes_about_axes_are_explained():
    layer = jaxbn.BatchNorm(axis_name="d")
    params, state = layer.init(3)
    x = jnp.ones((8, 3))
    with pytest.raises(NameError, match=r"no mapped axis 'd'.*leave axis_name out"):
        layer.apply(params, state, x, True)
    assert layer.apply(params, state, x, False)[0].shape == (8, 3)
    grouped = change(layer, axis_index_groups=[[0, 1], [2, 3]])
    by_device = jax.pmap(lambda x: grouped.apply(params, state, x, True), axis_name="d")
    with pytest.raises(ValueError, match="do not cover the 8 devices"):
        by_device(x[:, None])
    grouped = change(layer, axis_index_groups=jaxbn.axis_groups(8, 2))
    ensemble = jax.vmap(lambda x: grouped.apply(params, state, x, True), axis_name="d")
    with pytest.raises(NotImplementedError, match="nest two vmaps"):
        ensemble(x[:, None])
    for groups in ([[0, 1], [1, 2]], [[0, 2]], [[0], []]):
        with pytest.raises(ValueError, match="exactly one group"):
            change(layer, axis_index_groups=groups)
    with pytest.raises(ValueError, match="one axis_name"):
        jaxbn.BatchNorm(axis_index_groups=[[0, 1]])
    with pytest.raises(ValueError, match="group_size=3 does not divide num_devices=8"):
        jaxbn.axis_groups(8, 3)
