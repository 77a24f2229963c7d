"""Exported programs: of any size, for every platform, written to bytes and read again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.optim
from jaxbn import convert, tf1

PLATFORMS = "cpu", "cuda", "tpu"
BN = jaxbn.BatchNorm(momentum=0.9)
LAYERS = {
    "plain": BN,
    "channels_first": jaxbn.BatchNorm(feature_axes=1, activation=jax.nn.relu, ddof=1),
    "cumulative": jaxbn.BatchNorm(momentum=None, activation=jax.nn.gelu),
    "renorm": jaxbn.BatchRenorm(BN),
    "ghosts": jaxbn.GhostBatchNorm(BN, 4),
    "strided": jaxbn.GhostBatchNorm(jaxbn.BatchRenorm(BN), 4, layout="strided"),
    "gather": jaxbn.Gather(BN),
    "gather_ghosts": jaxbn.Gather(jaxbn.GhostBatchNorm(BN, 4)),
    "ema": convert.EmaBatchNorm(BN),
}
MODES = {"training": True, "inference": False, "traced": None}


def symbols(first):
    return export.symbolic_shape("4*b, 8, h, w" if first else "4*b, h, w, 8")


def step(layer, mode, weighted, params, state, x, flag, weights, residual):
    """Returns y, the state and the gradients."""

    def loss(params, x):
        options = {"weights": weights, "residual": residual} if weighted else {}
        training = flag if mode is None else mode
        y, after = layer.apply(params, state, x, training, **options)
        return (y**2).sum(), (y, after)

    gradients, (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return y, after, gradients


def travelled(function, *kinds):
    """Returns the function after a journey as bytes for all platforms."""
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(*kinds)
    back = export.deserialize(exported.serialize())
    assert back.platforms == PLATFORMS
    assert back.out_tree == exported.out_tree
    return back.call


def state_of(layer, state):
    return jaxbn.gather(state) if isinstance(layer, jaxbn.Gather) else state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_program_for_any_size_does_what_the_call_does(name, mode):
    pytest.importorskip("flatbuffers")
    # Weights are another program; each mode need not be of both.
    kinds = {"training": (False, True), "inference": (False,), "traced": (True,)}[mode]
    layer, mode = LAYERS[name], MODES[mode]
    params, state = layer.init(8)
    state = state_of(layer, state)
    shape = symbols(layer.feature_axes == 1)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    flag, rows = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct(shape[:1], x.dtype)
    for weighted in kinds:
        run = functools.partial(step, layer, mode, weighted)
        program = travelled(run, params, state, x, flag, rows, x)
        batch = drawn(4, 3, 2, first=layer.feature_axes == 1)
        for training in (True, False) if mode is None else (True,):
            arguments = params, state, batch[0], jnp.array(training), *batch[1:]
            want, got = jax.jit(run)(*arguments), program(*arguments)
            assert jax.tree.structure(got) == jax.tree.structure(want)
            near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
            jax.tree.map(near, got, want)


def drawn(rows, height, width, first=False):
    rng = np.random.default_rng(0)
    shape = (rows, 8, height, width) if first else (rows, height, width, 8)
    x, residual = (rng.normal(size=shape).astype(np.float32) + 2 for _ in range(2))
    return x, rng.choice([0.0, 1.0, 2.0], rows).astype(np.float32), residual


# On both sides of 64 KiB, 6 MiB and 40 MiB.
SIZES = [
    (4, 21, 21),
    (4, 23, 23),
    (64, 54, 54),
    (64, 56, 56),
    (64, 140, 140),
    (64, 145, 145),
]


def test_one_program_serves_both_sides_of_every_threshold():
    layer = jaxbn.BatchNorm(momentum=0.5, activation=jax.nn.relu)
    params, state = layer.init(8)

    def run(params, state, x):
        y, after = layer.apply(params, state, x, True)
        return (y**2).sum(), after

    grad = jax.value_and_grad(run, (0, 2), has_aux=True)
    x = jax.ShapeDtypeStruct(symbols(first=False), jnp.float32)
    exported = export.export(jax.jit(grad), platforms=PLATFORMS)(params, state, x)
    for size in SIZES:
        x, *_ = drawn(*size)
        want, got = jax.jit(grad)(params, state, x), exported.call(params, state, x)
        near = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-3)
        jax.tree.map(near, got, want)


def functions():
    """Functions of an x alone that hold a piece of the library each."""
    params, state = BN.init(8)
    stats = jaxbn.moments(jnp.ones((2, 8)))
    linen = jaxbn.linen.BatchNorm(use_running_average=False)
    norm = jaxbn.linen.Norm(LAYERS["ghosts"], use_running_average=False)
    own = linen.init(jax.random.key(0), jnp.ones((4, 2, 2, 8)))
    ghosts = norm.init(jax.random.key(0), jnp.ones((4, 2, 2, 8)))
    graph, variables = nnx.split(jaxbn.nnx.BatchNorm(8, rngs=nnx.Rngs(0)))

    def by_nnx(x):
        model = nnx.merge(graph, variables, copy=True)
        return model(x), model.mean[...], model.var[...]

    return {
        "moments": lambda x: jaxbn.moments(x, weights=x[..., :1] > 0),
        "update_running": lambda x: jaxbn.update_running(state, jaxbn.moments(x)),
        "merge_moments": lambda x: jaxbn.merge_moments(jaxbn.moments(x), stats),
        "normalize": lambda x: jaxbn.normalize(x, state.mean, state.var, params.scale),
        "dropout": lambda x: jaxbn.dropout(
            jax.random.key(0), x, 0.5, jnp.array(True), broadcast_axes=(1, 2)
        ),
        "affine": lambda x: jaxbn.as_affine(params, state._replace(mean=x.mean((0, 1, 2)))),
        "linen": lambda x: linen.apply(own, x, mutable=["batch_stats"]),
        "linen_norm": lambda x: norm.apply(ghosts, x, mutable=["batch_stats"]),
        "nnx": by_nnx,
    }


@pytest.mark.parametrize("name", functions())
def test_every_piece_is_exported_for_any_size(name):
    run = functions()[name]
    x = jax.ShapeDtypeStruct(symbols(first=False), jnp.float32)
    exported = export.export(jax.jit(run), platforms=PLATFORMS)(x)
    for size in ((4, 2, 2), (8, 20, 20)):
        x, *_ = drawn(*size)
        want, got = jax.jit(run)(x), exported.call(x)
        near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
        jax.tree.map(near, got, want)


def test_every_public_tuple_travels_with_a_program():
    pytest.importorskip("flatbuffers")
    params, state = BN.init(2)
    values = (
        params,
        state,
        jaxbn.BatchRenorm().init(2)[1],
        jaxbn.moments(jnp.ones((2, 2))),
        jaxbn.gather(state),
        jaxbn.as_affine(params, state),
        jaxbn.RenormLimits(*map(jnp.asarray, (0.5, 2.0, 1.0))),
        jaxbn.Ema(0.9, debias=True).init(params),
        jaxbn.optim.ModelAverage().init(params, state),
        tf1.ExponentialMovingAverage(0.9).init(params),
    )
    exported = export.export(jax.jit(lambda values: values))(values)
    back = export.deserialize(exported.serialize()).call(values)
    assert jax.tree.structure(back) == jax.tree.structure(values)
    assert [type(value) for value in back] == [type(value) for value in values]


def test_statistics_of_ones_own_travel_too_and_may_be_defined_again():
    pytest.importorskip("flatbuffers")
    for _ in range(2):

        @jaxbn.register_stats
        class OddStats(jaxbn.BatchStats):
            pass

        values = OddStats(jnp.zeros(2), jnp.ones(2))
        exported = export.export(jax.jit(lambda values: values))(values)
        back = export.deserialize(exported.serialize()).call(values)
        assert type(back) is OddStats
