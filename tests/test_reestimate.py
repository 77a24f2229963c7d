"""Statistics over many batches, against float64 NumPy: of a data set, of microbatches."""

import builtins
import functools
import re

import flax.linen as nn
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
from tests.drawn_variables import draw_variables
from tests.laws import oracle

RNG = np.random.default_rng(0)
SIZES = 30, 4, 4, 30, 4, 22, 4  # seven uneven batches, of few sizes to compile for
# Batches that lie apart, so that the variance between them counts.
DATA = (RNG.normal(size=(sum(SIZES), 6)) * [1, 2, 0.1, 5, 1, 1]).astype(np.float32)
DATA += np.repeat(RNG.normal(size=(7, 6)) * 2, SIZES, 0).astype(np.float32)
WEIGHTS = RNG.uniform(size=len(DATA)).astype(np.float32) * (
    RNG.uniform(size=len(DATA)) < 0.8
)
BATCHES = np.split(DATA, np.cumsum(SIZES)[:-1])
WEIGHED = list(zip(BATCHES, np.split(WEIGHTS, np.cumsum(SIZES)[:-1]), strict=True))


def truth(x, weights=None):
    """Returns mean and biased variance of all rows, in float64."""
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    mean = (w[:, None] * x).sum(0) / w.sum()
    return mean, (w[:, None] * (x - mean) ** 2).sum(0) / w.sum()


def assert_statistics(state, want, tolerance=1e-6):
    got = (
        (state["mean"], state["var"])
        if isinstance(state, dict)
        else (state.mean, state.var)
    )
    mean, var = want
    error = np.abs(np.asarray(got[0], np.float64) - mean) / np.sqrt(mean**2 + var)
    assert error.max() < tolerance, error.max()
    np.testing.assert_allclose(got[1], var, rtol=tolerance)


def one_norm(normalizer=None, training=True):
    bn = jaxbn.Gather(jaxbn.BatchNorm() if normalizer is None else normalizer)
    params, state = bn.init(6)

    @jax.jit
    def step(state, batch):
        x, weights = batch if isinstance(batch, tuple) else (batch, None)
        return bn.apply(params, state, x, training, weights=weights)[1]

    return step, state


# Re-estimation --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_uneven_batches_are_one_data_set(training):
    step, state = one_norm(training=training)
    assert_statistics(jaxbn.reestimate(step, state, BATCHES), truth(DATA))
    assert_statistics(jaxbn.reestimate(step, state, WEIGHED), truth(DATA, WEIGHTS))
    shuffled = jaxbn.reestimate(step, state, BATCHES[::-1])
    assert_statistics(shuffled, truth(DATA))


def test_where_pytorch_is_wrong_by_the_spread_of_the_batches():
    x = np.concatenate([RNG.normal(size=(64, 1)), RNG.normal(size=(64, 1)) + 10])
    bn = jaxbn.Gather(jaxbn.BatchNorm())
    params, state = bn.init(1)
    step = lambda state, x: bn.apply(params, state, jnp.asarray(x, jnp.float32), True)[1]
    state = jaxbn.reestimate(step, state, [x[:64], x[64:]])
    assert_statistics(state, truth(x))
    assert state.var[0] > 20  # the variances of the batches are 1


def test_a_long_data_set_is_pooled_in_double():
    # In float32, adding 1 to a count of 2^24 does nothing, and a mean stops moving.
    moments = jaxbn.Moments(jnp.zeros(1), jnp.ones(1), jnp.full(1, 2.0**24))
    last = jaxbn.Moments(jnp.full(1, 2.0**20), jnp.ones(1), jnp.ones(1))
    step = lambda state, m: state._replace(batch=m)
    _, state = jaxbn.BatchNorm().init(1)
    state = jaxbn.reestimate(step, state, [moments, *[last] * 64])
    n, k = 2.0**24, 64
    mean = k * 2.0**20 / (n + k)
    np.testing.assert_allclose(state.mean, mean, rtol=1e-7)
    var = 1 + n * k / (n + k) ** 2 * 2.0**40
    np.testing.assert_allclose(state.var, var, rtol=1e-7)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize(
    "normalizer",
    [
        jaxbn.BatchNorm(debias=True),
        jaxbn.BatchNorm(momentum=None),
        jaxbn.BatchRenorm(),
        jaxbn.BatchNorm(param_dtype=jnp.bfloat16),
    ],
)
def test_every_state_keeps_its_structure(normalizer, ddof):
    step, state = one_norm(normalizer)
    new = jaxbn.reestimate(step, state, BATCHES, ddof=ddof)
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert types(new) == types(state)
    mean, var = truth(DATA)
    assert_statistics(new, (mean, var * len(DATA) / (len(DATA) - ddof)))
    if isinstance(new, jaxbn.RenormStats):
        np.testing.assert_allclose(new.std**2, new.var, rtol=1e-5)
        np.testing.assert_array_equal(new.renorm_mean, new.mean)
    elif new.weight is not None:
        assert (new.weight == 1).all()


def test_ghost_batches_gather_the_whole():
    ghost = jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 7, tracking="averaged")
    step, state = one_norm(ghost)
    state = jaxbn.reestimate(step, state, np.split(DATA, 2))
    assert_statistics(state, truth(DATA))


# A model of two norms, of which one is used twice ---------------------------------------


class Net(nn.Module):
    """dense, first, relu, first again, dense, second."""

    @nn.compact
    def __call__(self, x, weights=None, *, train):
        first = jaxbn.linen.BatchNorm(not train, name="first")
        x = first(nn.Dense(6, name="in")(x), weights=weights)
        x = first(nn.relu(x), weights=weights)
        x = nn.Dense(4, name="out")(x)
        return jaxbn.linen.Norm(jaxbn.BatchNorm(), not train, name="second")(
            x, weights=weights
        )


class NnxNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        # The keys are those of linen's tree, so the tests read both alike.
        self.first = jaxbn.nnx.BatchNorm(6, rngs=rngs)
        self.second = jaxbn.nnx.Norm(jaxbn.BatchNorm(), 4)
        self.dense_in = nnx.Linear(6, 6, rngs=rngs)
        self.out = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x, weights=None):
        x = self.first(self.dense_in(x), weights=weights)
        x = self.first(nnx.relu(x), weights=weights)
        return self.second(self.out(x), weights=weights)


NET = Net()
VARIABLES = draw_variables(NET, DATA[:2], train=False)
VARIABLES["batch_stats"]["first"]["var"] = jnp.full(6, 4.0)


def inputs_of_norms(params, batches, statistics=None):
    """Returns the inputs of first and second and their weights, in float64.

    Normalized with the statistics of each batch, or with those given.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    dense = lambda x, p: x @ p["kernel"] + p["bias"]
    seen = {"first": [], "second": []}

    def norm(x, w, name):
        seen[name].append((x, w))
        mean, var = truth(x, w) if statistics is None else statistics[name]
        p = params[name]
        return (x - mean) / np.sqrt(var + 1e-5) * p["scale"] + p["bias"]

    for x, w in batches:
        x = norm(dense(np.asarray(x, np.float64), params["in"]), w, "first")
        x = norm(np.maximum(x, 0), w, "first")
        norm(dense(x, params["out"]), w, "second")
    return {
        name: [np.concatenate(part) for part in zip(*parts, strict=True)]
        for name, parts in seen.items()
    }


def population(params, batches, statistics=None):
    return {
        name: truth(*parts)
        for name, parts in inputs_of_norms(params, batches, statistics).items()
    }


@functools.cache
def nnx_net():
    net = NnxNet(nnx.Rngs(0))
    for name, module in (("in", net.dense_in), ("out", net.out)):
        nnx.update(module, VARIABLES["params"][name])
    return net


def reestimate_nnx(batches, **options):
    net = nnx.clone(nnx_net())
    net.first.var[...] = jnp.full(6, 4.0)
    training = options.pop("train")
    jaxbn.nnx.reestimate(net, batches, training=training, **options)
    layer = lambda module: {"mean": module.mean[...], "var": module.var[...]}
    return {"first": layer(net.first), "second": layer(net.second)}


def reestimate_linen(batches, **options):
    return jaxbn.linen.reestimate(NET.apply, VARIABLES, batches, **options)


STYLES = {"linen": reestimate_linen, "nnx": reestimate_nnx}


@pytest.mark.parametrize("style", STYLES)
def test_a_model_in_training_pools_every_application(style):
    got = STYLES[style](WEIGHED, train=True)
    want = population(VARIABLES["params"], WEIGHED)
    assert_statistics(got["first"], want["first"])
    assert_statistics(got["second"], want["second"], 2e-6)


@pytest.mark.parametrize("style", STYLES)
def test_passes_in_inference_end_where_inference_begins(style):
    got = STYLES[style](WEIGHED, train=False, passes=24)
    # Every norm holds the statistics of what it sees while all norms use what they hold.
    held = {
        name: [np.asarray(layer[key], np.float64) for key in ("mean", "var")]
        for name, layer in got.items()
    }
    want = population(VARIABLES["params"], WEIGHED, held)
    assert_statistics(got["first"], want["first"], 1e-4)
    assert_statistics(got["second"], want["second"], 1e-4)


def test_one_pass_in_inference_is_exact_for_what_depends_on_no_other():
    start = {"first": (np.zeros(6), np.full(6, 4.0)), "second": (np.zeros(4), np.ones(4))}
    got = reestimate_linen(WEIGHED, train=False)
    want = population(VARIABLES["params"], WEIGHED, start)
    assert_statistics(got["first"], want["first"])
    assert_statistics(got["second"], want["second"], 2e-6)


def test_what_is_masked_may_be_nan():
    spoiled = [(np.where(w[:, None] > 0, x, np.nan), w > 0) for x, w in WEIGHED]
    step, state = one_norm()
    assert_statistics(jaxbn.reestimate(step, state, spoiled), truth(DATA, WEIGHTS > 0))


def test_layers_in_a_scan_gather_each_their_own():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = jaxbn.linen.BatchNorm(not train, name="bn")(x)
            return nn.relu(x) * 2, None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            axes = {"params": 0, "batch_stats": 0}
            layers = nn.scan(
                nn.remat(Layer, static_argnums=2),
                axes,
                in_axes=nn.broadcast,
                length=3,
                split_rngs={"params": True},
            )
            return layers(name="layers")(x, train)[0]

    model = Deep()
    variables = model.init(jax.random.key(0), DATA[:4], False)
    got = jaxbn.linen.reestimate(
        lambda v, x, mutable: model.apply(v, x, True, mutable=mutable), variables, BATCHES
    )["layers"]["bn"]
    assert jax.tree.map(jnp.shape, got) == {"mean": (3, 6), "var": (3, 6)}
    means, variances, xs = [], [], [np.asarray(x, np.float64) for x in BATCHES]
    for _ in range(3):
        mean, var = truth(np.concatenate(xs))
        means, variances = [*means, mean], [*variances, var]
        xs = [np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 0) * 2 for x in xs]
    assert_statistics(got, (np.stack(means), np.stack(variances)), 2e-6)


# Devices --------------------------------------------------------------------------------


def spread_batches():
    """Returns batches of 8 shards of rows, padded, and weights that tell which count."""
    for x, w in WEIGHED:
        rows = -(-len(x) // 8) * 8
        padded = np.zeros((rows, 6), np.float32), np.zeros(rows, np.float32)
        padded[0][: len(x)], padded[1][: len(x)] = x, w
        yield padded


def by_shard_map(mesh, bn, params):
    shard = jax.shard_map(
        lambda state, x, w: bn.apply(params, state, x, True, weights=w)[1],
        mesh=mesh,
        in_specs=(P(), P("d"), P("d")),
        out_specs=P(),
    )
    return jax.jit(lambda state, batch: shard(state, *batch))


def by_pmap(mesh, bn, params):
    shard = jax.pmap(
        lambda state, x, w: bn.apply(params, state, x, True, weights=w)[1],
        axis_name="d",
        in_axes=(None, 0, 0),
    )

    def step(state, batch):
        x, w = batch
        after = shard(state, x.reshape(8, -1, 6), w.reshape(8, -1))
        return jax.tree.map(lambda leaf: leaf[0], after)

    return step


def by_sharded_jit(mesh, bn, params):
    step = jax.jit(lambda state, x, w: bn.apply(params, state, x, True, weights=w)[1])
    spread = NamedSharding(mesh, P("d"))
    return lambda state, batch: step(
        state, *(jax.device_put(part, spread) for part in batch)
    )


@pytest.mark.parametrize("style", [by_shard_map, by_pmap, by_sharded_jit])
def test_devices_see_one_data_set(style):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    axis_name = None if style is by_sharded_jit else "d"
    bn = jaxbn.Gather(jaxbn.BatchNorm(axis_name=axis_name))
    params, state = bn.init(6)
    state = jaxbn.reestimate(style(mesh, bn, params), state, list(spread_batches()))
    assert_statistics(state, truth(DATA, WEIGHTS))


def test_a_linen_model_under_shard_map():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    model = jaxbn.linen.BatchNorm(use_running_average=False, axis_name="d")
    variables = model.init(jax.random.key(0), DATA[:2])

    def apply(variables, x, weights, mutable):
        def shard(variables, x, weights):
            return model.apply(variables, x, weights=weights, mutable=mutable)

        specs = (P(), P("d"), P("d")), (P("d"), P())
        return jax.shard_map(shard, mesh=mesh, in_specs=specs[0], out_specs=specs[1])(
            variables, x, weights
        )

    got = jaxbn.linen.reestimate(apply, variables, spread_batches())
    assert_statistics(got, truth(DATA, WEIGHTS))


# Microbatches ---------------------------------------------------------------------------

NORMALIZERS = {
    "plain": jaxbn.BatchNorm(momentum=0.9),
    "debiased": jaxbn.BatchNorm(momentum=0.9, debias=True),
    "cumulative": jaxbn.BatchNorm(momentum=None, ddof=1),
    "renorm": jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.9)),
    # What is gathered is the whole batch, however a step alone would track it.
    "ghost": jaxbn.GhostBatchNorm(
        jaxbn.BatchNorm(momentum=0.9, ddof=1), 7, tracking="averaged"
    ),
}
MICRO = DATA.reshape(7, 14, 6)
MICRO_WEIGHTS = WEIGHTS.reshape(7, 14)


def near(got, want):
    for name, value in oracle.tree(got).items():
        if value is not None:
            np.testing.assert_allclose(
                value, want[name], rtol=1e-6, atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_microbatches_are_tracked_once_as_one_batch(name, traced):
    normalizer = NORMALIZERS[name]
    bn = jaxbn.Gather(normalizer)
    params, state = bn.init(6)
    state = state._replace(mean=state.mean + 3)

    @jax.jit
    def accumulate(state, training):
        def step(state, batch):
            y, state = bn.apply(
                params, state, batch[0], training if traced else True, weights=batch[1]
            )
            return state, y

        gathered, y = jax.lax.scan(step, jaxbn.gather(state), (MICRO, MICRO_WEIGHTS))
        return jaxbn.track_gathered(gathered), y

    after, y = accumulate(state, True)
    core = normalizer.inner if name == "ghost" else normalizer
    # One update with the whole batch: the truth of all 98 rows.
    whole = oracle.apply(
        core,
        oracle.tree(params),
        oracle.tree(state),
        DATA.astype(np.float64),
        True,
        WEIGHTS,
    )[1]
    near(after, whole)
    # Each microbatch is normalized as if nothing were gathered.
    for i in range(7):
        want, _ = normalizer.apply(params, state, MICRO[i], True, weights=MICRO_WEIGHTS[i])
        np.testing.assert_allclose(y[i], want, rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_gather_without_gathering_is_its_norm():
    bn = NORMALIZERS["plain"]
    params, state = bn.init(6)
    for training in (True, False):
        got = jaxbn.Gather(bn).apply(params, state, DATA, training)
        jax.tree.map(
            np.testing.assert_array_equal, got, bn.apply(params, state, DATA, training)
        )


def test_gathering_adds_no_pass_and_no_collective_and_no_gradient():
    bn = jaxbn.BatchNorm(axis_name="d")
    params, state = bn.init(6)
    x = jnp.asarray(DATA.reshape(7, 14, 6))

    def loss(state, norm):
        def shard(x):
            y, after = norm.apply(params, state, x, True)
            return (y**3).sum() + sum(leaf.sum() for leaf in jax.tree.leaves(after))

        return lambda x: jax.vmap(shard, axis_name="d")(x).sum()

    plain = jax.grad(loss(state, bn))
    gathered = jax.grad(loss(jaxbn.gather(state), jaxbn.Gather(bn)))
    np.testing.assert_allclose(plain(x), gathered(x), rtol=1e-6)
    count = lambda f: len(
        re.findall("= psum", str(jax.make_jaxpr(jax.vmap(f, axis_name="d"))(x)))
    )
    step = lambda norm, state: lambda x: norm.apply(params, state, x, True)
    assert count(step(bn, state)) == count(step(jaxbn.Gather(bn), jaxbn.gather(state))) == 1


def test_microbatches_of_a_linen_model():
    rows = [np.asarray(x, np.float64) for x in MICRO]
    weighed = list(zip(rows, MICRO_WEIGHTS, strict=True))

    @jax.jit
    def accumulate(batch_stats):
        def step(batch_stats, batch):
            variables = {**VARIABLES, "batch_stats": batch_stats}
            _, updates = NET.apply(variables, *batch, train=True, mutable=["batch_stats"])
            return updates["batch_stats"], None

        return jax.lax.scan(step, jaxbn.linen.gather(batch_stats), (MICRO, MICRO_WEIGHTS))[
            0
        ]

    before = VARIABLES["batch_stats"]
    after = jaxbn.linen.track_gathered(accumulate(before))
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for name, (mean, var) in population(VARIABLES["params"], weighed).items():
        old = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), before[name])
        want = 0.99 * old["mean"] + 0.01 * mean, 0.99 * old["var"] + 0.01 * var
        assert_statistics(after[name], want)


def test_microbatches_of_an_nnx_model():
    net = nnx.clone(nnx_net())
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(net))}

    @nnx.jit
    def accumulate(net, batches):
        jaxbn.nnx.gather(net)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        def step(net, batch):
            return net, net(*batch)

        step(net, batches)
        jaxbn.nnx.track_gathered(net)

    accumulate(net, (jnp.asarray(MICRO), jnp.asarray(MICRO_WEIGHTS)))
    assert {path for path, _ in nnx.to_flat_state(nnx.state(net))} == paths
    weighed = list(zip(MICRO, MICRO_WEIGHTS, strict=True))
    for name, (mean, var) in population(VARIABLES["params"], weighed).items():
        layer = getattr(net, name)
        want = 0.01 * mean, 0.99 + 0.01 * var
        assert_statistics({"mean": layer.mean[...], "var": layer.var[...]}, want)


def test_a_frozen_layer_stays_frozen_while_others_gather():
    bn = jaxbn.Gather(jaxbn.BatchNorm())
    params, state = bn.init(6)
    y, after = bn.apply(params, jaxbn.gather(state), DATA, False)
    np.testing.assert_array_equal(y, bn.apply(params, state, DATA, False)[0])
    jax.tree.map(np.testing.assert_array_equal, jaxbn.track_gathered(after), state)
    layer = jaxbn.linen.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), DATA)
    gathered = {**variables, "batch_stats": jaxbn.linen.gather(variables["batch_stats"])}
    _, updates = layer.apply(gathered, DATA, mutable=["batch_stats"])
    tracked = jaxbn.linen.track_gathered(updates["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, tracked, variables["batch_stats"])
    assert layer.apply(gathered, DATA).shape == DATA.shape  # evaluation needs no mutable


# What is refused ------------------------------------------------------------------------

STEP, STATE = one_norm()


class Foreign(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(False, name="ours")(
            nn.BatchNorm(False, name="theirs")(x)
        )


def linen_foreign(batches=BATCHES):
    model = Foreign()
    variables = model.init(jax.random.key(0), DATA)
    return jaxbn.linen.reestimate(model.apply, variables, batches)


def with_nan(index):
    batches = [np.array(x) for x in BATCHES]
    batches[index][0, 2] = np.nan
    return batches


REFUSED = {
    "nan": (
        lambda: jaxbn.reestimate(STEP, STATE, with_nan(3)),
        ValueError,
        "batch 3",
        "NaN",
    ),
    "nan_linen": (
        lambda: linen_foreign(with_nan(2)),
        ValueError,
        "batch 2 at ours",
        "params",
    ),
    "nan_nnx": (
        lambda: jaxbn.nnx.reestimate(nnx.clone(nnx_net()), with_nan(0)),
        ValueError,
        "first",
        "No state was changed",
    ),
    "unseen": (linen_foreign, ValueError, "features of theirs", "norm of jaxbn"),
    "no_batches": (
        lambda: jaxbn.reestimate(STEP, STATE, []),
        ValueError,
        "0 batches",
        "Pass",
    ),
    "all_masked": (
        lambda: jaxbn.reestimate(STEP, STATE, [(BATCHES[0], np.zeros(30, np.float32))]),
        ValueError,
        "the norm",
        "weight 0",
    ),
    "iterator": (
        lambda: jaxbn.reestimate(STEP, STATE, iter(BATCHES), passes=2),
        ValueError,
        "passes=2.*iterator",
        "list",
    ),
    "not_gathered": (
        lambda: jaxbn.reestimate(lambda state, x: state.stats, STATE, BATCHES),
        TypeError,
        "BatchStats",
        r"Gather\(bn\)",
    ),
    "no_states": (
        lambda: jaxbn.gather({"a": jnp.ones(3)}),
        ValueError,
        "no BatchStats",
        "init",
    ),
    "twice": (
        lambda: jaxbn.gather(jaxbn.gather(STATE)),
        ValueError,
        "already",
        "track_gathered",
    ),
    "not_begun": (lambda: jaxbn.track_gathered(STATE), ValueError, "no Gathered", "gather"),
    "custom": (lambda: jaxbn.Gather(jaxbn.Ema(0.9)), TypeError, "Ema", "Wrap"),
    "ddof": (
        lambda: jaxbn.reestimate(STEP, STATE, BATCHES, ddof=-1),
        ValueError,
        "-1",
        "0 or 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use_is_told(name):
    act, kind, fact, remedy = REFUSED[name]
    with pytest.raises(kind, match="(?s)" + fact) as caught:
        act()
    assert re.search(remedy, str(caught.value)), str(caught.value)


def test_a_progress_bar_is_an_extra(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    state = jaxbn.reestimate(STEP, STATE, BATCHES, progress=True)
    assert_statistics(state, truth(DATA))
    assert "7/7" in capsys.readouterr().err
    real = builtins.__import__

    def without(name, *rest):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'jaxbn\[progress\]'"):
        jaxbn.reestimate(STEP, STATE, BATCHES, progress=True)
