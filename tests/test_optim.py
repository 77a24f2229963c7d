"""optim: what is a norm is known in every kind of tree, and optax does as it is told."""

import importlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import optim

BN = jaxbn.BatchNorm()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(3)(x)
        return jaxbn.linen.BatchNorm(use_running_average=True)(x), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(3)(x))
        x = nn.GroupNorm(num_groups=1)(x)
        x = nn.RMSNorm()(x)
        stacked = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=4,
        )
        return nn.Dense(1, name="head")(stacked()(x)[0])


class Nnx(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0)
        def ensemble(rngs):
            return jaxbn.nnx.BatchNorm(3, rngs=rngs)

        self.layers = nnx.Sequential(
            nnx.Linear(2, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)
        )
        self.norm = jaxbn.nnx.BatchNorm(3, use_bias=False, rngs=rngs)
        self.members = ensemble(rngs)


def linen_params():
    with jax.numpy_rank_promotion("allow"):
        return Linen().init(jax.random.key(0), jnp.ones((2, 3)))["params"]


def functional_params():
    """Stacked layers, scales of shape (1, 1, C), other libraries' names, lists."""
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), BN.init(3)[0])
    return [
        {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "bn": stacked},
        jaxbn.BatchNormParams(None, jnp.ones(3)),
        jaxbn.BatchNormParams(jnp.ones((4, 3)), None),
        {
            "conv/~/batch_norm": {
                "scale": jnp.ones((1, 1, 3)),
                "offset": jnp.ones((1, 1, 3)),
            }
        },
        {"weight": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))},
        {"weight": jnp.ones((3, 2)), "bias": jnp.ones(3)},
        {"linear": {"w": jnp.ones((5, 3, 3)), "b": jnp.ones((5, 3))}},
        {"norm1": {"weight": jnp.ones(3)}, "embed": {"weight": jnp.ones(3)}},
        {"vector": jnp.ones(3), "position": {"bias": jnp.ones((3, 3))}},
    ]


TREES = {
    "linen": (
        linen_params,
        r"(LayerNorm|GroupNorm|RMSNorm|BatchNorm)_0\W+(scale|bias)",
        r"kernel",
    ),
    "nnx": (
        lambda: nnx.state(Nnx(nnx.Rngs(0)), nnx.Param),
        r"(norm|members|layers'\]\[1)\W+(scale|bias)",
        r"kernel",
    ),
    "nnx_pure_dict": (
        lambda: nnx.to_pure_dict(nnx.state(Nnx(nnx.Rngs(0)))),
        r"(norm|members|layers'\]\[1)\W+(scale|bias)",
        r"kernel",
    ),
    "functional": (
        functional_params,
        r"\.scale|\.bias|scale|offset|^\[4\]|norm1",
        r"kernel|^\[5\].*weight|\['w'\]|embed|vector",
    ),
}


def paths_where(tree, predicate):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path) for path, leaf in pairs if predicate(leaf)}


@pytest.fixture(params=TREES)
def case(request):
    make, norm, decayed = TREES[request.param]
    params = make()
    every = paths_where(params, lambda _: True)
    assert len(every) > 4
    norms = {path for path in every if re.search(norm, path) and "mean" not in path}
    return params, norms, {path for path in every if re.search(decayed, path)}


def test_weight_decay_is_for_kernels_alone(case):
    params, _, decayed = case
    mask = optim.decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert paths_where(mask, lambda leaf: leaf) == decayed
    tx = optax.add_decayed_weights(0.5, mask=optim.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    changed = jax.tree.map(
        lambda u, p: bool((u == 0.5 * p).all() & p.any()), updates, params
    )
    assert paths_where(changed, bool) == decayed


@pytest.mark.parametrize("trained", ["norm", "other"])
def test_norms_freeze_and_train_alone(case, trained):
    params, norms, _ = case
    transforms = {"norm": optax.set_to_zero(), "other": optax.set_to_zero()}
    tx = optax.multi_transform({**transforms, trained: optax.sgd(1.0)}, optim.norm_labels)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    moved = paths_where(updates, lambda leaf: bool((leaf == -1).all()))
    still = paths_where(updates, lambda leaf: bool((leaf == 0).all()))
    assert (moved if trained == "norm" else still) == norms
    assert not moved & still


def test_the_penalty_is_that_of_the_scales(case):
    params, norms, _ = case
    pairs = jax.tree_util.tree_leaves_with_path(params)
    drawn = np.random.default_rng(0)
    values = [drawn.normal(size=leaf.shape).astype(np.float32) for _, leaf in pairs]
    scales = [
        value.astype(np.float64)
        for (path, _), value in zip(pairs, values, strict=True)
        if jax.tree_util.keystr(path) in norms
        and not re.search("bias|offset", jax.tree_util.keystr(path))
    ]
    assert scales
    tree = jax.tree.unflatten(jax.tree.structure(params), list(map(jnp.asarray, values)))
    got = optim.scale_penalty(tree, l1=0.3, l2=0.2)
    want = sum(0.3 * np.abs(s).sum() + 0.2 * np.square(s).sum() for s in scales)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    gradient = jax.grad(lambda p: optim.scale_penalty(p, l1=0.3))(tree)
    touched = {path for path in norms if not re.search("bias|offset", path)}
    assert paths_where(gradient, lambda leaf: bool(leaf.any())) == touched


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_penalty_is_summed_in_float32_or_wider(dtype, x64):
    params, _ = jaxbn.BatchNorm(param_dtype=dtype).init(1000)
    got = optim.scale_penalty((params, jnp.ones(3)), l1=1.0)
    assert got == 1000
    assert got.dtype == ("float64" if dtype == "float64" else "float32")


def test_scales_stay_within_their_limits(case):
    params, norms, _ = case
    tx = optax.chain(optax.sgd(1.0), optim.clip_scale(0.25, 1.5))
    state, rng = tx.init(params), np.random.default_rng(0)
    biases = {path for path in norms if re.search("bias|offset", path)}

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        grads = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), params
        )
        free = jax.tree.map(lambda p, g: np.asarray(p) - np.asarray(g), params, grads)
        params, state = step(params, state, grads)
        clipped = jax.tree.map(lambda leaf: np.clip(leaf, 0.25, 1.5), free)
        trees = map(jax.tree_util.tree_leaves_with_path, (params, free, clipped))
        for (path, got), (_, loose), (_, tight) in zip(*trees, strict=True):
            bound = jax.tree_util.keystr(path) in norms - biases
            np.testing.assert_allclose(got, tight if bound else loose, rtol=1e-6, atol=1e-7)


def test_linen_layers_of_optax_train_and_decay_no_scale():
    params = linen_params()
    loss = lambda p: sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(p["head"]))
    tx = optax.adamw(0.1, weight_decay=0.1, mask=optim.decay_mask)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    moved = paths_where(updates, lambda leaf: bool(leaf.any()))
    assert moved == paths_where(optim.decay_mask(params), bool)  # the head's bias is 0


def test_an_nnx_optimizer_takes_the_mask():
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.adamw(0.1, weight_decay=0.5, mask=optim.decay_mask), wrt=nnx.Param
    )
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    with jax.numpy_dtype_promotion("standard"):
        optimizer.update(model, jax.tree.map(jnp.zeros_like, before))
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), before, nnx.state(model, nnx.Param)
    )
    assert paths_where(moved, bool) == {"['layers']['layers'][0]['kernel'].value"}


@pytest.mark.parametrize("decay", [None, 0.0, 0.9])
def test_models_are_averaged_with_their_statistics(decay):
    rng, average = np.random.default_rng(0), optim.ModelAverage(decay)
    params, stats = BN.init(3)
    state = average.init({"w": params}, stats)
    update = jax.jit(average.update)
    models, hidden, weight = [], 0.0, 0.0
    for _ in range(12):
        drawn = rng.normal(size=(4, 3)).astype(np.float32) ** 2
        model = {"w": jaxbn.BatchNormParams(*drawn[:2])}, jaxbn.BatchStats(*drawn[2:])
        state = update(state, *model)
        models.append(drawn.astype(np.float64))
        if decay is not None:
            hidden = decay * hidden + (1 - decay) * models[-1]
            weight = decay * weight + 1 - decay
        want = np.mean(models, 0) if decay is None else hidden / weight
        got = average.value(state, like=model)
        np.testing.assert_allclose(
            np.stack(jax.tree.leaves(got)), want, rtol=3e-6, atol=1e-6
        )
    assert update._cache_size() == 1
    assert jax.tree.structure(got) == jax.tree.structure(model)


def test_averaged_statistics_fit_the_averaged_weights_of_a_linear_layer():
    """The mean exactly, the variance from above, closer than the pooled variance."""
    rng, average = np.random.default_rng(0), optim.ModelAverage()
    x = rng.normal(size=(500, 4)) + 1
    kernels = rng.normal(size=(10, 4, 3))
    state = average.init(jnp.zeros((4, 3)), BN.init(3)[1])
    for kernel in kernels:
        y = jnp.asarray((x @ kernel).astype(np.float32))
        batch = jaxbn.moments(y)
        state = average.update(state, jnp.asarray(kernel), jaxbn.BatchStats(*batch[:2]))
    _, stats = average.value(state)
    truth = x @ kernels.mean(0)
    np.testing.assert_allclose(stats.mean, truth.mean(0), rtol=1e-4, atol=1e-5)
    pooled = np.stack([x @ kernel for kernel in kernels]).var((0, 1))
    assert (truth.var(0) <= stats.var).all()
    assert (stats.var < pooled).all()


NO_NORMS = {
    "block": {"gamma": jnp.array([-0.5, 0.5]), "dense": {"kernel": jnp.ones((2, 2))}},
    "attention": {"scale": jnp.array(-2.0)},
}


def test_a_scale_alone_is_no_norm():
    tx = optim.clip_scale(minimum=0.0)
    zero = jax.tree.map(jnp.zeros_like, NO_NORMS)
    updates, _ = tx.update(zero, tx.init(NO_NORMS), NO_NORMS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
    assert optim.scale_penalty(NO_NORMS, l1=1.0, l2=1.0) == 0
    assert set(jax.tree.leaves(optim.norm_labels(NO_NORMS))) == {"other"}
    # It is no kernel either.
    kernels = paths_where(optim.decay_mask(NO_NORMS), bool)
    assert kernels == {"['block']['dense']['kernel']"}


@pytest.mark.parametrize(
    "norm",
    [
        {"ln_f": {"scale": jnp.ones(2)}},
        {"BatchNorm_0": {"gamma": jnp.ones(2)}},
        {"inner": {"scale": jnp.ones(2), "bias": jnp.ones(2)}},
        {"inner": {"scale": jnp.ones(2), "mean": jnp.ones(2), "var": jnp.ones(2)}},
        {"inner": jaxbn.BatchNormParams(jnp.ones(2), None)},
    ],
)
def test_statistics_a_bias_or_a_name_make_a_norm_of_a_scale(norm):
    assert optim.scale_penalty(norm, l1=1.0) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_the_penalty_pushes_no_scale_off_0(dtype):
    scale = jnp.array([-2, 0, -0.0, 3], dtype)
    penalty = lambda scale: optim.scale_penalty({"norm": {"scale": scale}}, l1=1.0)
    assert penalty(scale) == 5
    assert jax.grad(penalty)(scale).tolist() == [-1, 0, 0, 1]


@pytest.mark.parametrize(
    ("call", "error", "fact", "remedy"),
    [
        (lambda: optim.decay_mask(jnp.ones(3)), TypeError, "single array", "names"),
        (lambda: optim.norm_labels(jnp.ones(3)), TypeError, "single array", "names"),
        (lambda: optim.scale_penalty({}, l1=-1.0), ValueError, "-1.0", "minimized"),
        (lambda: optim.clip_scale(2.0, 1.0), ValueError, "2.0 and 1.0", "Swap"),
        (
            lambda: optim.clip_scale().update({}, optax.EmptyState()),
            ValueError, "no params", r"tx\.update\(grads, opt_state, params\)",
        ),
        (lambda: optim.ModelAverage(1.5), ValueError, "1.5", "0.999"),
        (lambda: optim.ModelAverage("0.9"), TypeError, "'0.9'", "update"),
    ],
)  # fmt: skip
def test_a_mistake_gets_a_fact_and_a_remedy(call, error, fact, remedy):
    with pytest.raises(error, match=fact) as caught:
        call()
    assert re.search(remedy, str(caught.value)), caught.value


def test_only_clip_scale_needs_optax(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optax", None)
    importlib.reload(optim)
    assert optim.decay_mask({"bn": {"scale": jnp.ones(2)}}) == {"bn": {"scale": False}}
    with pytest.raises(ImportError, match=r"jaxbn\[optax\]"):
        optim.clip_scale()
