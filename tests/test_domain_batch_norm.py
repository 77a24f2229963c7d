"""Several domains: a row sees its own domain and no other, whoever calls and wherever."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.laws.styles import mesh
from tests.laws.test_sync import collectives

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(8, 5, 3)) * 2 + 3).astype(np.float32)
IDS = np.array([0, 2, 0, 0, 2, 2, 0, 2])
NORM = jaxbn.DomainBatchNorm(jaxbn.BatchNorm(momentum=0.5), 3)
PARAMS, STATE = NORM.init(3)


def truth(x, ids, domain):
    """Returns the rows of a domain normalized, their mean and variance, in float64."""
    rows = x[ids == domain].astype(np.float64)
    mean, var = rows.mean((0, 1)), rows.var((0, 1))
    return (rows - mean) / np.sqrt(var + 1e-5), mean, var


def check(y, state, x=X, ids=IDS):
    for domain in np.unique(ids):
        want, mean, var = truth(x, ids, domain)
        np.testing.assert_allclose(np.asarray(y)[ids == domain], want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.mean[domain], mean / 2, rtol=1e-5)
        np.testing.assert_allclose(state.var[domain], (1 + var) / 2, rtol=1e-5)
    for domain in set(range(3)) - set(ids.tolist()):
        assert (state.mean[domain] == 0).all()
        assert (state.var[domain] == 1).all()


def test_each_row_has_the_statistics_of_its_domain():
    step = jax.jit(lambda x, ids: NORM.apply(PARAMS, STATE, x, True, domains=ids))
    for ids in (IDS, IDS.astype(np.int8), np.full(8, 1)):
        check(*step(X, ids), ids=ids)
    check(*step(X, 1), ids=np.full(8, 1))
    check(*step(X.transpose(0, 2, 1)[..., :3], IDS), x=X.transpose(0, 2, 1)[..., :3])


def test_a_domain_that_is_not_finite_spoils_no_other():
    x = np.where(IDS[:, None, None] == 0, np.nan, X)
    y, state = NORM.apply(PARAMS, STATE, x, True, domains=IDS)
    want, mean, _ = truth(X, IDS, 2)
    np.testing.assert_allclose(y[IDS == 2], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.mean[2], mean / 2, rtol=1e-5)
    assert (state.mean[0] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_id_costs_what_batch_norm_costs(dtype):
    x = jnp.ones((32, 16, 16, 64), dtype)

    def cost(norm, **options):
        params, state = norm.init(64)

        def step(params, x, dy, options):
            def y_of(params, x):
                return norm.apply(params, state, x, True, **options)

            y, pull, after = jax.vjp(y_of, params, x, has_aux=True)
            return y, after, pull(dy)

        program = jax.jit(step).lower(params, x, x, options).compile()
        stored = program.memory_analysis().temp_size_in_bytes
        return program.cost_analysis()["bytes accessed"] / x.nbytes, stored / x.nbytes

    own, of_bank = cost(jaxbn.BatchNorm()), cost(NORM, domains=jnp.int32(1))
    np.testing.assert_allclose(of_bank, own, atol=0.05)


def test_an_unknown_row_is_nan_and_counts_nowhere():
    ids = IDS.copy()
    ids[:2] = -1, 7
    weights = jnp.asarray(ids >= 0) & jnp.asarray(ids < 3)

    @jax.jit
    def step(params, x, ids):
        y, state = NORM.apply(params, STATE, x, True, domains=ids)
        kept = jnp.where(weights[:, None, None], y, 0)
        return (kept**3).sum(), (y, state)

    gradients, (y, state) = jax.grad(step, (0, 1), has_aux=True)(PARAMS, X, ids)
    assert np.isnan(y[:2]).all()
    check(y[2:], state, X[2:], ids[2:])
    assert not gradients[1][:2].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    y, state = jax.jit(lambda i: NORM.apply(PARAMS, STATE, X, True, domains=i))(3)
    assert np.isnan(y).all()
    jax.tree.map(np.testing.assert_array_equal, state, STATE)


def test_devices_of_several_domains_meet_in_one_collective():
    norm = jaxbn.DomainBatchNorm(jaxbn.BatchNorm(momentum=0.5, axis_name="d"), 3)

    def run(x, ids):
        return norm.apply(PARAMS, STATE, x, True, domains=ids)

    # An id for each device: the clients of a federation.
    y, state = jax.pmap(run, axis_name="d")(X[:, None], IDS)
    check(y[:, 0], jax.tree.map(lambda leaf: leaf[0], state))
    spec = P("d")
    mapped = jax.shard_map(
        run,
        mesh=mesh(),
        in_specs=(spec, spec),
        out_specs=(spec, P()),
    )
    check(*jax.jit(mapped)(X, IDS))
    y, state = jax.vmap(run, axis_name="d", out_axes=(0, None))(X[:, 0], IDS)
    check(y[:, None], state, X[:, :1])

    def loss(x, ids):
        return (run(x, ids)[0] ** 2).sum()

    for ids in (jnp.int32(1), jnp.arange(8) % 3):
        for function, want in ((loss, 1), (jax.grad(loss), 2)):
            jaxpr = jax.make_jaxpr(function, axis_env=[("d", 8)])(X, ids)
            assert collectives(jaxpr.jaxpr) == want


def test_it_gathers_reestimates_and_folds():
    layer = jaxbn.Gather(NORM)
    for training in (True, False):
        state = jaxbn.gather(STATE)
        for part in (slice(0, 3), slice(3, 8)):
            _, state = layer.apply(PARAMS, state, X[part], training, domains=IDS[part])
        for domain in (0, 2):
            _, mean, var = truth(X, IDS, domain)
            np.testing.assert_allclose(state.batch.mean[domain], mean, rtol=1e-5)
            np.testing.assert_allclose(state.batch.var[domain], var, rtol=1e-5)
    ids = np.arange(8) % 3
    step = lambda state, part: layer.apply(PARAMS, state, X[part], True, domains=ids[part])[
        1
    ]
    state = jaxbn.reestimate(step, STATE, [slice(0, 3), slice(3, 8)])
    np.testing.assert_allclose(state.var[1], truth(X, ids, 1)[2], rtol=1e-5)
    with pytest.raises(ValueError, match=r"another affine map.*of_domain"):
        jaxbn.as_affine(PARAMS, state, NORM)
    own = NORM.of_domain(PARAMS, state, 1)
    affine = jaxbn.as_affine(*own, NORM.bn)
    y, _ = NORM.apply(PARAMS, state, X, False, domains=1)
    np.testing.assert_allclose(
        X * affine.scale[None, None] + affine.bias[None, None], y, atol=1e-5
    )


def test_ghost_batches_go_around_it_too():
    inside = jaxbn.DomainBatchNorm(jaxbn.GhostBatchNorm(NORM.bn, 4), 3)
    around = jaxbn.GhostBatchNorm(NORM, 4)
    got, want = (
        norm.apply(PARAMS, STATE, X, True, domains=IDS) for norm in (around, inside)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for rows in (slice(0, 4), slice(4, 8)):
        part, _ = NORM.apply(PARAMS, STATE, X[rows], True, domains=IDS[rows])
        np.testing.assert_allclose(got[0][rows], part, rtol=1e-5, atol=1e-5)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, domains, train):
        norm = jaxbn.linen.Norm(NORM, use_running_average=not train, name="norm")
        return norm(x, domains=domains)


def test_flax_modules_take_domains_in_the_call():
    model = Model()
    variables = model.init(jax.random.key(0), X, IDS, False)
    y, updates = model.apply(variables, X, IDS, True, mutable=["batch_stats"])
    check(y, jaxbn.BatchStats(**updates["batch_stats"]["norm"]))
    ids = np.arange(8) % 3
    stats = jaxbn.linen.reestimate(model.apply, variables, [(X, ids)], train=True)
    np.testing.assert_allclose(stats["norm"]["mean"][2], truth(X, ids, 2)[1], rtol=1e-5)
    pooled = jaxbn.pool_states(stats, np.bincount(ids))
    wide = X.astype(np.float64)
    np.testing.assert_allclose(pooled["norm"]["var"], wide.var((0, 1)), rtol=1e-5)

    layer = jaxbn.nnx.Norm(NORM, 3)
    y = nnx.jit(lambda layer, x, ids: layer(x, domains=ids))(layer, X, IDS)
    check(y, jaxbn.BatchStats(layer.mean[...], layer.var[...]))


@pytest.mark.parametrize(
    "layer",
    [
        jaxbn.BatchNorm(momentum=0.0),
        jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.0), momentum=0.0),
    ],
)
def test_states_of_clients_pool_into_that_of_all_their_rows(layer):
    params, start = layer.init(3)
    rows = (1, 5, 2)
    parts = np.split(X, np.cumsum(rows)[:-1])
    states = [{"a": layer.apply(params, start, part, True)[1]} for part in parts]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    pooled = jax.jit(jaxbn.pool_states)(stacked, jnp.array(rows))["a"]
    want = layer.apply(params, start, X, True)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), pooled, want)
    alike = jaxbn.pool_states(stacked)["a"]
    np.testing.assert_allclose(alike.mean, stacked["a"].mean.mean(0), rtol=1e-5)


def apply(domains=IDS, norm=NORM, x=X, params=PARAMS, state=STATE):
    return norm.apply(params, state, x, True, domains=domains)


STACKED = jaxbn.BatchStats(jnp.ones((2, 3)), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("mistake", "kind", "told"),
    [
        (lambda: apply(3), ValueError, r"0 to 2, got 3.*num_domains"),
        (lambda: apply(-1), ValueError, r"0 to 2, got -1"),
        (lambda: jax.jit(lambda x: apply(np.arange(8), x=x))(X), ValueError, "got 3 among"),
        (lambda: apply(np.arange(5) % 3), ValueError, r"\(5,\).*\(8,\)"),
        (lambda: apply(None), TypeError, r"no domains\. Write domains="),
        (lambda: NORM.apply(PARAMS, STATE, X, False), TypeError, "Write domains="),
        (lambda: apply(1.0), TypeError, "integers, got float"),
        (lambda: apply(True), TypeError, "integers, got bool"),
        (lambda: apply(state=jaxbn.BatchNorm().init(3)[1]), ValueError, r"\(3, 3\).*init"),
        (
            lambda: jaxbn.DomainBatchNorm(jaxbn.BatchNorm(feature_axes=0), 2).apply(
                *jaxbn.DomainBatchNorm(jaxbn.BatchNorm(feature_axes=0), 2).init(8),
                X[..., 0],
                True,
                domains=IDS % 2,
            ),
            ValueError,
            r"\(8,\) do not fit.*one id for all",
        ),
        (lambda: jaxbn.DomainBatchNorm(NORM, 2), TypeError, "one domain.*Number all"),
        (lambda: jaxbn.DomainBatchNorm(NORM.bn, 0), ValueError, "positive, got 0"),
        (lambda: jaxbn.DomainBatchNorm(NORM.bn, 2.0), TypeError, "num_domains"),
        (lambda: jaxbn.DomainBatchNorm(NORM.bn, 2, affine="own"), ValueError, "'own'"),
        (lambda: jaxbn.DomainBatchNorm(2, 2), TypeError, "takes a normalizer|asks a norm"),
        (lambda: NORM.of_domain(PARAMS, STATE, 3), ValueError, "0 to 2, got 3"),
        (lambda: NORM.of_domain(PARAMS, STATE, IDS), ValueError, "one id for all"),
        (lambda: jaxbn.pool_states(PARAMS), TypeError, "running statistics, got"),
        (lambda: jaxbn.pool_states([]), TypeError, "nothing"),
        (lambda: jaxbn.pool_states(STACKED, [1.0]), ValueError, r"\(2,\) .*\(1,\)"),
        (lambda: jaxbn.pool_states(STACKED, [-1.0, 2]), ValueError, "0 or more"),
        (lambda: jaxbn.pool_states(STACKED, [0, 0]), ValueError, "not all 0"),
        (lambda: jaxbn.pool_states((STACKED, STATE)), ValueError, r"\[\(2,\), \(3,\)\]"),
    ],
)
def test_mistakes_are_explained(mistake, kind, told):
    with pytest.raises(kind, match=told):
        mistake()
