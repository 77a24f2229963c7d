"""A batch spread over devices: equal to the whole batch in every parallel style."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from tests.laws.modules import EquinoxBatchNorm, HaikuBatchNorm
from tests.laws.placed import Placed
from tests.laws.styles import DEVICES, PLAIN, STYLES, flat, mesh, value_and_gradients
from tests.laws.test_laws import change

ROWS = 6
LAYERS = {
    "default": (jaxbn.BatchNorm(), (3,)),
    "channels_first": (
        jaxbn.BatchNorm(feature_axes=1, ddof=1, momentum=None, use_bias=False),
        (3, 2),
    ),
    "renorm": (jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.7)), (3,)),
    "ghosts": (jaxbn.GhostBatchNorm(jaxbn.BatchNorm(momentum=0.7), 3), (3,)),
    "ghosts_renorm": (
        jaxbn.GhostBatchNorm(jaxbn.BatchRenorm(), 2, layout="strided", tracking="averaged"),
        (3,),
    ),
    "domains": (
        Placed(jaxbn.DomainBatchNorm(jaxbn.BatchNorm(momentum=0.7), 2), (0, 1, 1)),
        (3,),
    ),
    "equinox": (EquinoxBatchNorm(), (3,)),
    "haiku": (HaikuBatchNorm(), (3,)),
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


def by_one_device(layer, devices, params, state, *batch):
    """Returns what one device makes of the batch of all.

    It finds the rows of a ghost batch of all devices side by side, or, if strided, already
    as far apart as they must be.
    """
    shape, order = batch[0].shape, np.arange(DEVICES * ROWS)
    if isinstance(layer, jaxbn.GhostBatchNorm):
        size = layer.virtual_batch_size
        if layer.layout == "contiguous":
            order = order.reshape(devices, -1, size).swapaxes(0, 1).ravel()
        layer = dataclasses.replace(layer, virtual_batch_size=devices * size)
    rows = jax.tree.map(lambda leaf: leaf[order], flat(batch))
    y, after, by_params, by_x = value_and_gradients(layer, params, state, *rows)
    y, by_x = (leaf[np.argsort(order)].reshape(shape) for leaf in (y, by_x))
    return y, after, by_params, by_x


@functools.cache
def on_one_device(case, devices):
    return jax.jit(functools.partial(by_one_device, LAYERS[case][0], devices))


# To a layer all named axes are alike, and so is every jit of sharded arrays: two layers, of
# which one nests all others, run in every style. Drawn tests run all of them in all.
SPREAD = [
    (case, style)
    for case in LAYERS
    for style in STYLES
    if style in ("shard_map", "auto_jit") or case in ("default", "ghosts_renorm")
]


@pytest.mark.parametrize(("case", "style"), SPREAD)
def test_a_spread_batch_is_the_whole_batch(case, style):
    layer, shape = LAYERS[case]
    make, devices = STYLES[style]
    params, state = layer.init(3)
    program, one = make(layer), on_one_device(case, devices)
    # Without weights it is another program, and those of a style are alike.
    for shards in SHARDS if style in PLAIN else SHARDS[1:]:
        batch = draw(shards, shape)
        want = one(params, state, *batch)
        got = program(params, state, *batch)
        near = functools.partial(
            np.testing.assert_allclose, rtol=1e-5, atol=1e-5, err_msg=shards
        )
        jax.tree.map(near, got, want)


@pytest.mark.parametrize("style", PLAIN)
@pytest.mark.parametrize("offset", [1.0, 1e3])
def test_a_large_spread_batch_is_the_whole_batch(style, offset):
    """Large shards are summed in other ways than small ones; far from 0, in yet another."""
    layer = jaxbn.BatchNorm(momentum=0.5)
    params, state = layer.init(2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(DEVICES, 8192, 2)) + offset * (
        1 + np.arange(DEVICES)[:, None, None]
    )
    x, dy = x.astype(np.float32), rng.normal(size=x.shape).astype(np.float32)
    y, after, by_params, by_x = STYLES[style][0](layer)(params, state, x, None, dy)
    wide = x.astype(np.float64).reshape(-1, 2)
    mean, var = wide.mean(0), wide.var(0)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    near(after.mean, mean / 2)
    near(after.var, (var + 1) / 2)
    normal = (wide - mean) / np.sqrt(var + 1e-5)
    near(y.reshape(-1, 2), normal, atol=1e-3 if offset > 1 else 1e-5)
    flat_dy = dy.astype(np.float64).reshape(-1, 2)
    near(by_params.bias, flat_dy.sum(0), atol=2e-3)
    near(by_params.scale, (flat_dy * normal).sum(0), atol=2e-3)
    back = flat_dy.mean(0) + normal * (flat_dy * normal).mean(0)
    near(by_x.reshape(-1, 2), (flat_dy - back) / np.sqrt(var + 1e-5), atol=2e-5)


@pytest.mark.parametrize("style", ["pmap", "shard_map"])
def test_an_ensemble_inside_a_style(style):
    """Members of an unnamed vmap keep their statistics to themselves."""
    layer = jaxbn.BatchNorm(axis_name="d", momentum=0.5)
    state = layer.init(3)[1]
    x, weights, _ = draw("one_empty", (2, 3))
    scale = jnp.array([[1.0, 2, 3], [-1, 0, 0.5]])
    members = jaxbn.BatchNormParams(scale, scale + 1)

    def run(x, weights):
        one = lambda params, x: layer.apply(params, state, x, True, weights=weights)
        return jax.vmap(one, in_axes=(0, -2), out_axes=(-2, 0))(members, x)

    if style == "pmap":
        y, after = jax.pmap(run, axis_name="d")(x, weights)
        after = jax.tree.map(lambda leaf: leaf[0], after)
    else:
        options = {"in_specs": P("d"), "out_specs": (P("d"), P())}
        y, after = jax.jit(jax.shard_map(run, mesh=mesh(), **options))(*flat((x, weights)))
    alone = jaxbn.BatchNorm(momentum=0.5)
    for member in range(2):
        params = jax.tree.map(lambda leaf, i=member: leaf[i], members)
        rows, w = x[..., member, :].reshape(-1, 3), weights.reshape(-1)
        want, stats = alone.apply(params, state, rows, True, weights=w)
        got = y.reshape(-1, 2, 3)[:, member]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(after.var[member], stats.var, rtol=1e-5)


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


@pytest.mark.parametrize("style", ["pmap", "shard_map", "unchecked_shard_map"])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_share_statistics_among_themselves(groups, style):
    members = GROUPS[groups]
    x, weights, _ = draw("masked", (3,))
    layer = jaxbn.BatchNorm(axis_name="d", axis_index_groups=members, momentum=0.5)
    params, state = layer.init(3)

    def run(x, weights):
        y, after = layer.apply(params, state, x, True, weights=weights)
        return y, after

    if style == "pmap":
        y, after = jax.pmap(run, axis_name="d")(x, weights)
    else:
        mapped = jax.shard_map(
            lambda x, w: jax.tree.map(lambda leaf: leaf[None], run(x[0], w[0])),
            mesh=mesh(),
            in_specs=P("d"),
            out_specs=P("d"),
            check_vma=style == "shard_map",
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


@pytest.mark.parametrize("state_varies", [False, True])
def test_an_activation_with_constants_inside_shard_map(state_varies):
    def halved_twice(y):
        return jax.lax.scan(lambda y, _: (0.5 * y + 1, None), y, None, length=2)[0]

    layer = jaxbn.BatchNorm(axis_name="d", activation=halved_twice)
    params, state = layer.init(3)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), state)
    x = draw("full", (3,))[0].reshape(-1, 3)

    def loss(x, state):
        state = jax.tree.map(lambda leaf: leaf[0], state)
        y = layer.apply(params, state, x, training=not state_varies)[0]
        return jax.lax.pmean((y**2).mean(), "d")

    in_specs = P("d"), P("d") if state_varies else P()
    run = jax.shard_map(loss, mesh=mesh(), in_specs=in_specs, out_specs=P())
    got, slope = jax.jit(jax.value_and_grad(run))(x, state)

    def alone(x):
        bn = jaxbn.BatchNorm()
        y = bn.apply(*bn.init(3), x, training=not state_varies)[0]
        return ((0.25 * y + 1.5) ** 2).mean()

    want, want_slope = jax.value_and_grad(alone)(x)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-4, atol=1e-7)


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

    with jax.set_mesh(mesh(kind=kind)):
        spread = jax.device_put(x, NamedSharding(mesh(kind=kind), P("d")))
        params = jax.device_put(params, NamedSharding(mesh(kind=kind), P()))
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


@pytest.mark.parametrize("weighted", [0.0, 1.0])
@pytest.mark.parametrize("layer", [jaxbn.BatchNorm(momentum=None), jaxbn.BatchRenorm()])
def test_a_pooled_state_leaves_a_checked_shard_map(layer, weighted):
    params, state = layer.init(3)
    x = draw("full", (3,))[0].reshape(-1, 3)

    def epoch(x):
        _, after = layer.apply(params, state, x, True)
        return jaxbn.sync_state(after, "d", weight=weighted * x.shape[0])

    # Without any weight, all replicas count alike: then it is as with equal weights.
    got, want = by_mesh(epoch, P())(x), by_mesh(epoch, P(), check_vma=False)(x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want)
    alone = jax.vmap(lambda x: layer.apply(params, state, x, True)[1])
    means = alone(x.reshape(DEVICES, -1, 3)).mean
    np.testing.assert_allclose(got.mean, means.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "means", "want"),
    [
        # Two features: one whose pooled variance fits no number of the dtype, one sound.
        ("float32", [[1e20, 0.0], [-1e20, 4.0]], ([1e20, 2.0], [1.0, 5.0])),
        ("float16", [[300.0, 0.0], [-300.0, 4.0]], ([300.0, 2.0], [1.0, 5.0])),
        # 200^2 + 1 fits float16, which the sums on the way to it do not.
        ("float16", [[200.0, 0.0], [-200.0, 4.0]], ([0.0, 2.0], [40001.0, 5.0])),
        # What a replica has lost is that of the others.
        ("float32", [[np.inf, 0.0], [3.0, 4.0]], ([3.0, 2.0], [1.0, 5.0])),
    ],
)
def test_a_pooled_feature_that_does_not_fit_keeps_the_first_state(dtype, means, want):
    mean = jnp.asarray(means, dtype)
    states = jaxbn.BatchStats(mean, jnp.ones_like(mean))
    pooled = jax.vmap(lambda s: jaxbn.sync_state(s, "d"), axis_name="d")(states)
    for got, wanted in zip(pooled[:2], want, strict=True):
        assert got.dtype == dtype
        wanted = np.broadcast_to(np.asarray(wanted, dtype), got.shape)
        np.testing.assert_array_equal(got, wanted)
    groups = ((1, 0), (2, 3))
    run = lambda s: jaxbn.sync_state(s, "d", axis_index_groups=groups)
    four = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), states)
    grouped = jax.vmap(run, axis_name="d")(four).mean
    first = np.where(want[0][0] == means[0][0], means[1][0], want[0][0])
    np.testing.assert_array_equal(grouped[0, 0], np.asarray(first, dtype))


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


def by_mesh(run, out_specs, **options):
    return jax.jit(
        jax.shard_map(run, mesh=mesh(), in_specs=P("d"), out_specs=out_specs, **options)
    )


def test_mistakes_about_axes_are_explained():
    layer = jaxbn.BatchNorm(axis_name="d")
    params, state = layer.init(3)
    x = jnp.ones((8, 3))
    run = lambda x: layer.apply(params, state, x, True)
    with jax.set_mesh(mesh()):
        for mistaken in (run, jax.jit(run), jax.vmap(run, axis_name="e", in_axes=1)):
            with pytest.raises(NameError, match=r"no mapped axis 'd'.*leave axis_name out"):
                mistaken(x if mistaken is run else x[:, None])
    assert layer.apply(params, state, x, False)[0].shape == (8, 3)
    for name in (0, ["d"], {"d"}, ("d", "d"), ("d", ("e",))):
        with pytest.raises(TypeError, match='Write "data" or'):
            jaxbn.BatchNorm(axis_name=name)
    nested = change(layer, axis_name=("d", "v"))
    inner = lambda x: nested.apply(params, state, x[None], True)[0]
    with pytest.raises(NotImplementedError, match=r"axes \('v',\) of vmap.*mesh axes"):
        by_mesh(jax.vmap(inner, axis_name="v"), P(None, "d"))(x)
    halves = lambda x: layer.apply(params, state, x[:, :2], True)
    with pytest.raises(
        ValueError, match=r"shape \(2,\) for x of shape \(1, 2\), got \(3,\)"
    ):
        by_mesh(halves, P("d"))(x)
    unlike = jaxbn.Moments(jnp.ones(3), jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(2,\)"):
        jax.vmap(lambda _: jaxbn.sync_moments(unlike, "d"), axis_name="d")(x)
    for weight in (-1.0, np.ones(3), np.nan):
        with pytest.raises(ValueError, match=r"that this replica|a replica counts"):
            jax.vmap(
                lambda _, w=weight: jaxbn.sync_state(state, "d", weight=w), axis_name="d"
            )(x)


def test_mistakes_about_groups_are_explained():
    layer = jaxbn.BatchNorm(axis_name="d")
    params, state = layer.init(3)
    x = jnp.ones((8, 1, 3))
    grouped = change(layer, axis_index_groups=[[0, 1], [2, 3]])
    by_device = jax.pmap(lambda x: grouped.apply(params, state, x, True), axis_name="d")
    with pytest.raises(ValueError, match="do not cover the 8 devices"):
        by_device(x)
    grouped = change(layer, axis_index_groups=jaxbn.axis_groups(8, 2))
    ensemble = jax.vmap(lambda x: grouped.apply(params, state, x, True), axis_name="d")
    with pytest.raises(NotImplementedError, match="nest two vmaps"):
        ensemble(x)
    for groups in ([[0, 1], [1, 2]], [[0, 2]], [[0], []], []):
        with pytest.raises(ValueError, match="exactly one group"):
            change(layer, axis_index_groups=groups)
    for groups in (2, [0, 1], [[0.5, 1]]):
        with pytest.raises(TypeError, match=r"Write \(\(0, 1\), \(2, 3\)\)"):
            change(layer, axis_index_groups=groups)
    with pytest.raises(ValueError, match="one axis_name"):
        jaxbn.BatchNorm(axis_index_groups=[[0, 1]])
    for devices in (8, -9, 0):
        with pytest.raises(ValueError, match=f"group_size=3 .* num_devices={devices}"):
            jaxbn.axis_groups(devices, 3)


def test_a_forgotten_axis_name_is_loud_where_jax_tracks_what_varies():
    layer = jaxbn.BatchNorm()
    params, state = layer.init(3)
    x = draw("full", (3,))[0].reshape(-1, 3)
    track = lambda x: layer.apply(params, state, x, True)[1]
    for training in (True, jnp.array(True)):
        with pytest.raises(ValueError, match=r"shard_map .* out_specs"):
            by_mesh(lambda x, t=training: layer.apply(params, state, x, t)[1], P())(x)
    steps = lambda x: jax.lax.fori_loop(
        0, 2, lambda _, s: layer.apply(params, s, x, True)[1], state
    )
    with pytest.raises(TypeError, match=r"pcast|pvary"):
        by_mesh(steps, P())(x)
    # Elsewhere it is silent, and the replicas tell.
    silent = by_mesh(track, P(), check_vma=False)(x)
    assert jaxbn.replica_differences(silent).keys() == {".mean", ".var"}
    # Local statistics that are meant so are those of each shard.
    local = by_mesh(lambda x: jax.tree.map(lambda s: s[None], track(x)), P("d"))(x)
    want = jax.vmap(track)(x.reshape(DEVICES, -1, 3))
    np.testing.assert_allclose(local.var, want.var, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_pooled_moments_and_their_gradients_are_those_of_the_whole(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5, 3)) + np.arange(4)[:, None, None]
    if dtype == "complex64":
        x = x + 1j * rng.normal(size=x.shape)
    x, weights = jnp.asarray(x, dtype), jnp.asarray(rng.integers(0, 3, (4, 5)), jnp.float32)

    def size(moments):
        return (jnp.abs(moments.mean) ** 3 * jnp.arange(3.0) + jnp.sqrt(moments.var)).sum()

    def spread(x):
        each = lambda x, w: jaxbn.sync_moments(jaxbn.moments(x, weights=w), "d")
        pooled = jax.vmap(each, axis_name="d", out_axes=None)(x, weights)
        return size(pooled), pooled

    def whole(x):
        moments = jaxbn.moments(x.reshape(20, 3), weights=weights.reshape(20))
        return size(moments), moments

    (got, moments), (want, known) = (
        jax.jit(jax.grad(f, has_aux=True))(x) for f in (spread, whole)
    )
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, (got, moments), (want, known))
