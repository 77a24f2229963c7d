"""Meshes of explicit, automatic and mixed axes: whatever is split, and whenever made."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert

BN = jaxbn.BatchNorm(momentum=0.7)
LAYERS = {
    "plain": BN,
    "channels_first": jaxbn.BatchNorm(feature_axes=1, activation=jax.nn.relu, ddof=1),
    "cumulative": jaxbn.BatchNorm(momentum=None, activation=jax.nn.gelu),
    "renorm": jaxbn.BatchRenorm(BN),
    "ghosts": jaxbn.GhostBatchNorm(BN, 4),
    "strided": jaxbn.GhostBatchNorm(jaxbn.BatchRenorm(BN), 4, layout="strided"),
    "gather": jaxbn.Gather(jaxbn.GhostBatchNorm(BN, 4)),
    "ema": convert.EmaBatchNorm(BN),
}
SPLITS = ("d",), ("m",), ("d", "m"), ()
# Where params and state come from: before the mesh, the same everywhere, split by feature.
ORIGINS = {"before": None, "replicated": P(), "split": P("m")}
MODES = (True, None), (False, None), (None, True), (None, False)
OPTIONS = "none", "rows", "full", "adjustment"


def grid(*kinds):
    return jax.make_mesh((4, 2), ("d", "m"), axis_types=kinds)


AUTO = AxisType.Auto, AxisType.Auto
EXPLICIT = AxisType.Explicit, AxisType.Explicit
MESHES = [
    EXPLICIT,
    AUTO,
    (AxisType.Auto, AxisType.Explicit),
    (AxisType.Explicit, AxisType.Auto),
]


def step(layer, mode, params, state, x, flag, options):
    def loss(params, x):
        training = flag if mode is None else mode
        y, after = layer.apply(params, state, x, training, **options)
        return (y**3).sum(), (y, after)

    gradients, (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, after, gradients


def options_of(name, shape):
    rng = np.random.default_rng(1)
    vector = jnp.linspace(0.5, 1.5, 8)
    return {
        "none": {},
        "rows": {"weights": jnp.asarray(rng.random(16) < 0.7)},
        "full": {
            "weights": jnp.asarray(rng.random(shape), jnp.float32),
            "residual": jnp.asarray(rng.normal(size=shape), jnp.float32),
        },
        "adjustment": {"adjustment": (vector, vector)},
    }[name]


def draws(name):
    """Returns combinations of which each pair of neighbours occurs, not the product."""
    every = list(itertools.product(MESHES, SPLITS, ORIGINS))
    for turn, (mesh, split, origin) in enumerate(every[len(name) % 7 :: 7]):
        option = OPTIONS[turn % 4]
        option = "none" if name == "ema" and option == "adjustment" else option
        yield mesh, split, origin, MODES[turn * 3 // 2 % 4], option


@pytest.mark.parametrize("name", LAYERS)
def test_a_mesh_changes_no_number_and_no_sharding(name):
    layer = LAYERS[name]
    first = layer.feature_axes == 1
    shape = (16, 8, 3) if first else (16, 3, 8)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 2
    # A mode's program for one device is the same whatever the mesh is afterwards.
    programs = {
        mode: jax.jit(functools.partial(step, layer, mode)) for mode in (True, False, None)
    }
    for kinds, split, origin, (mode, flag), option in draws(name):
        params, state = layer.init(8)
        state = jaxbn.gather(state) if name == "gather" else state
        flag, options = jnp.array(bool(flag)), options_of(option, shape)
        run = programs[mode]
        want = run(params, state, x, flag, options)
        feature = "m" if "m" in split else None
        spec = P(
            "d" if "d" in split else None, *((feature, None) if first else (None, feature))
        )
        mesh = grid(*kinds)
        with jax.set_mesh(mesh):
            spread = jax.device_put(x, NamedSharding(mesh, spec))
            if ORIGINS[origin] is not None:
                where = NamedSharding(mesh, ORIGINS[origin])
                params, state = jax.device_put((params, state), where)
            y, after, gradients = run(params, state, spread, flag, options)
            assert jax.typeof(y) == jax.typeof(spread)
            if origin != "before":
                assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
                kinds_of = jax.tree.map(jax.typeof, (params, spread))
                assert jax.tree.map(jax.typeof, gradients) == kinds_of
        near = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
        jax.tree.map(near, (y, after, gradients), want)


def pieces(params, state, x):
    """Returns calls of the functions of the library that take arrays, by name."""
    batch, key = jaxbn.moments(x), jax.random.key(0)
    vectors = state.mean, state.var, params.scale, params.bias
    return {
        "moments": lambda: jaxbn.moments(x, weights=jnp.ones(16)),
        "update_running": lambda: jaxbn.update_running(state, batch, momentum=0.5),
        "merge_moments": lambda: jaxbn.merge_moments(
            jaxbn.Moments(*state[:2], state.var), batch
        ),
        "normalize": lambda: jax.grad(lambda v: (jaxbn.normalize(x, *v) ** 2).sum())(
            vectors
        ),
        "dropout": lambda: jaxbn.dropout(
            key, x, 0.5, jnp.array(True), broadcast_axes=(0,), scaled_at="inference"
        ),
        "dropout_gradient": lambda: jax.grad(
            lambda x: jaxbn.dropout(key, x, 0.5, True).sum()
        )(x),
        "scan": lambda: jax.lax.scan(
            lambda s, _: (BN.apply(params, s, x, True)[1], None), state, length=2
        )[0],
    }


@pytest.mark.parametrize("origin", ORIGINS)
def test_the_pieces_work_on_explicit_axes(origin):
    mesh, x = grid(*EXPLICIT), np.random.default_rng(0).normal(size=(16, 8))
    x = jnp.asarray(x, jnp.float32)
    params, state = BN.init(8)
    want = {name: run() for name, run in pieces(params, state, x).items()}
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, NamedSharding(mesh, P("d", "m")))
        if ORIGINS[origin] is not None:
            where = NamedSharding(mesh, ORIGINS[origin])
            params, state = jax.device_put((params, state), where)
        for name, run in pieces(params, state, spread).items():
            for got in (run(), jax.jit(run)()):
                near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
                jax.tree.map(functools.partial(near, err_msg=name), got, want[name])


def of_linen(x):
    layer = jaxbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)

    def loss(x):
        y, updated = layer.apply(variables, x, mutable=["batch_stats"])
        return (y**3).sum(), (y, updated)

    return jax.jit(jax.grad(loss, has_aux=True))(x)


def of_nnx(x):
    layer = jaxbn.nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    y = nnx.jit(lambda layer, x: layer(x))(layer, x)
    return y, nnx.to_pure_dict(nnx.state(layer))


def reestimated(x):
    params, state = BN.init(8)
    bn = jaxbn.Gather(BN)
    update = lambda state, x: bn.apply(params, state, x, True)[1]
    return jaxbn.reestimate(update, state, [x, x * 2])


def reestimated_nnx(x):
    layer = jaxbn.nnx.reestimate(jaxbn.nnx.BatchNorm(8, rngs=nnx.Rngs(0)), [x, x * 2])
    return nnx.to_pure_dict(nnx.state(layer))


USES = of_linen, of_nnx, reestimated, reestimated_nnx


@pytest.mark.parametrize("use", USES)
def test_modules_and_estimates_see_the_whole_batch_on_any_mesh(use):
    x = jnp.asarray(np.random.default_rng(0).normal(2, 1, (16, 8)), jnp.float32)
    want = use(x)
    for kinds in (AUTO, EXPLICIT, MESHES[3]):
        mesh = grid(*kinds)
        with jax.set_mesh(mesh):
            got = use(jax.device_put(x, NamedSharding(mesh, P("d", "m"))))
        near = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
        jax.tree.map(near, got, want)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA of JAX 0.7 splits no empty array"
)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("spec", [P(None, "m"), P("d"), P("d", "m")])
def test_ghost_batches_of_nothing_on_explicit_axes(layout, spec):
    layer = jaxbn.GhostBatchNorm(BN, 2, layout=layout)
    params, state = layer.init(4)
    with jax.set_mesh(grid(*EXPLICIT)):
        x = jax.device_put(jnp.zeros((0, 4)), NamedSharding(grid(*EXPLICIT), spec))
        y, after = jax.jit(layer.apply, static_argnums=3)(params, state, x, True)
        gradient = jax.grad(lambda x: layer.apply(params, state, x, True)[0].sum())(x)
    assert jax.typeof(y) == jax.typeof(gradient) == jax.typeof(x)
    jax.tree.map(np.testing.assert_array_equal, after, state)
