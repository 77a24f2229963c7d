"""Models that others wrote: norms replaced, frozen and synchronised from outside."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

OPTIMIZED = True
X = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32) * 2 + 1


class Block(nnx.Module):
    """In the manner of a published ResNet, which was written for inference."""

    def __init__(self, features, rngs, downsample=None):
        conv = functools.partial(nnx.Conv, kernel_size=(1, 1), use_bias=False, rngs=rngs)
        self.conv0 = conv(features, features)
        self.bn0 = nnx.BatchNorm(features, use_running_average=True, rngs=rngs)
        self.conv1 = conv(features, features)
        self.bn1 = nnx.BatchNorm(features, momentum=0.9, use_bias=False, rngs=rngs)
        self.downsample = downsample

    def __call__(self, x):
        y = nnx.relu(self.bn0(self.conv0(x)))
        y = self.bn1(self.conv1(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        shared = nnx.BatchNorm(3, rngs=rngs)
        self.stem = nnx.Sequential(nnx.Conv(3, 3, (1, 1), rngs=rngs), shared)
        self.block = Block(3, rngs, shared)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block(self.stem(x)).mean((1, 2)))


def means(model):
    return {
        "/".join(map(str, path[:-1])): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
        if path[-1] == "mean"
    }


def moved(before, after):
    return {path for path in before if (before[path] != after[path]).any()}


def test_norms_become_ours_in_place_with_their_variables():
    model, theirs = Net(), Net()
    scale, shared = model.block.bn0.scale, model.block.downsample
    changed = jaxbn.nnx.replace(model)
    paths = ["block/bn0", "block/bn1", "block/downsample"]
    assert sorted(path for path, _, _ in changed) == paths
    assert "block/bn1: flax.BatchNorm(momentum=0.9, epsilon=1e-05) -> jaxbn" in repr(
        changed
    )
    assert type(model.block.bn0) is jaxbn.nnx.BatchNorm
    assert model.block.bn0.scale is scale
    assert model.block.bn1.bias is None
    assert model.stem.layers[1] is model.block.downsample is shared
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(nnx.state(theirs))
    for switch in ("train", "eval"):
        getattr(model, switch)()
        getattr(theirs, switch)()
        np.testing.assert_allclose(model(X), theirs(X), rtol=1e-4, atol=1e-5)
    for path, mean in means(model).items():
        np.testing.assert_allclose(mean, means(theirs)[path], rtol=1e-4, atol=1e-5)


def test_replaced_norms_synchronise():
    model = Net()
    jaxbn.nnx.replace(model, axis_name="d", momentum=0.5)
    model.train()
    graph, state = nnx.split(model)

    def run(state, x):
        model = nnx.merge(graph, state)
        return model(x), nnx.state(model, nnx.BatchStat)

    y, after = jax.vmap(run, (None, 0), axis_name="d")(state, X.reshape(4, 2, 4, 4, 3))
    whole = Net()
    jaxbn.nnx.replace(whole, momentum=0.5)
    whole.train()
    np.testing.assert_allclose(y.reshape(8, 2), whole(X), rtol=1e-4, atol=1e-5)
    mean = after["block"]["bn1"]["mean"][...]
    np.testing.assert_array_equal(mean, np.broadcast_to(mean[:1], mean.shape))
    np.testing.assert_allclose(mean[0], whole.block.bn1.mean[...], rtol=1e-4, atol=1e-5)


def test_any_normalizer_takes_over_the_statistics():
    model = Net()
    model.train()
    model(X)
    model.eval()
    want, momentum = model(X), []

    def make(bn):
        momentum.append(bn.momentum)
        return jaxbn.BatchRenorm(bn)

    changed = jaxbn.nnx.replace(model, make, only="block/bn*")
    assert [path for path, _, _ in changed] == ["block/bn0", "block/bn1"]
    assert momentum == [0.99, 0.9]
    assert type(model.stem.layers[1]) is nnx.BatchNorm
    np.testing.assert_allclose(model(X), want, rtol=1e-4, atol=1e-5)
    norm = model.block.bn1
    np.testing.assert_allclose(norm.std[...], np.sqrt(norm.var[...]), rtol=1e-6)
    jaxbn.nnx.replace(
        model,
        lambda bn: jaxbn.DomainBatchNorm(bn, 2, affine="separate"),
        only=nnx.PathContains("downsample"),
    )
    bank = model.stem.layers[1]
    assert bank.mean.shape == bank.scale.shape == (2, 3)
    np.testing.assert_array_equal(bank.mean[0], bank.mean[1])
    assert bank.mean[...].any()


def test_what_is_frozen_keeps_its_statistics_until_it_is_unfrozen():
    model = Net()
    frozen = jaxbn.nnx.freeze(model, "block/bn*")
    assert [path for path, _, _ in frozen] == ["block/bn0", "block/bn1"]
    train = nnx.jit(lambda model, x: model(x))
    start = means(model)
    model.train()
    train(model, X)
    model.set_attributes(use_running_average=False)
    if hasattr(nnx, "view"):
        nnx.view(model, use_running_average=False)(X)
    model.block.bn0(X, use_running_average=False)
    shared = moved(start, means(model))
    assert shared == {"block/downsample"}
    want = (X - start["block/bn0"]) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(model.block.bn0(X), want, rtol=1e-5)
    jaxbn.nnx.replace(model)
    jaxbn.nnx.reestimate(model, [X])
    assert moved(start, means(model)) == shared
    loss = lambda model: model(X).sum()
    assert nnx.grad(loss)(model)["block"]["bn0"]["scale"][...].any()
    thawed = jaxbn.nnx.unfreeze(model, nnx.PathContains("bn1"))
    assert repr(thawed) == "block/bn1: frozen -> jaxbn.BatchNorm"
    train(model, X)
    assert moved(start, means(model)) == {"block/bn1", "block/downsample"}


class LinenBlock(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(3, use_bias=False)(x)
        y = nn.relu(self.norm()(y))
        return x + self.norm(scale_init=nn.initializers.ones, use_bias=False)(y)


class LinenNet(nn.Module):
    """In the manner of Flax's own example."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name="batch"
        )
        x = norm(name="bn_init", axis_name=None)(x)
        for _ in range(2):
            x = LinenBlock(functools.partial(norm, axis_name=None))(x)
        return nn.Dense(2)(x.mean((1, 2)))


NET = LinenNet()
VARIABLES = NET.init(jax.random.key(0), X, train=False)
PATHS = {
    "bn_init",
    *(f"LinenBlock_{i}/BatchNorm_{j}" for i in (0, 1) for j in (0, 1)),
}


def train(variables=VARIABLES, x=X):
    return NET.apply(variables, x, mutable=["batch_stats"])


def moved_in(updates):
    flat = jax.tree_util.tree_leaves_with_path(updates["batch_stats"])
    before = jax.tree.leaves(VARIABLES["batch_stats"])
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for (path, new), old in zip(flat, before, strict=True)
        if (new != old).any()
    }


def test_norms_of_a_linen_model_run_on_ours():
    far = X + 1e4
    with jaxbn.linen.replaced() as norms:
        y, updates = train(x=far)
    assert {path for path, _, _ in norms} == PATHS
    assert "bn_init: flax.BatchNorm(momentum=0.9" in repr(norms)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert kinds(updates["batch_stats"]) == kinds(VARIABLES["batch_stats"])
    # What Flax's own variance, E[x^2] - E[x]^2, has lost.
    var = updates["batch_stats"]["bn_init"]["var"]
    want = 0.9 + 0.1 * far.astype(np.float64).var((0, 1, 2))
    np.testing.assert_allclose(var, want, rtol=1e-4)
    assert not np.allclose(
        train(x=far)[1]["batch_stats"]["bn_init"]["var"], want, rtol=1e-2
    )
    with jaxbn.linen.replaced():
        made = NET.init(jax.random.key(0), X, train=False)
        y = NET.apply(VARIABLES, X, train=False)
    jax.tree.map(np.testing.assert_array_equal, made, VARIABLES)
    np.testing.assert_allclose(y, NET.apply(VARIABLES, X, train=False), rtol=1e-5)


def test_norms_of_a_linen_model_are_frozen_and_synchronised():
    with (
        jaxbn.linen.replaced("LinenBlock_0/*", use_running_average=True) as frozen,
        jaxbn.linen.replaced(axis_name="d") as others,
    ):
        parts = X.reshape(4, 2, 4, 4, 3)
        y, updates = jax.vmap(lambda x: train(x=x), axis_name="d")(parts)
    still = {path for path, _, _ in frozen}
    assert still == {path for path in PATHS if "Block_0" in path}
    assert {path for path, _, _ in others} == PATHS - still
    mean = updates["batch_stats"]["bn_init"]["mean"]
    np.testing.assert_array_equal(mean, np.broadcast_to(mean[:1], mean.shape))
    one = jax.tree.map(lambda leaf: leaf[0], updates)
    assert moved_in(one) == PATHS - still
    with jaxbn.linen.replaced("LinenBlock_0/*", use_running_average=True):
        want, whole = train()
    np.testing.assert_allclose(y.reshape(8, 2), want, rtol=1e-4, atol=1e-5)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, one, whole)


def in_context(only=None, call=train, **changes):
    with jaxbn.linen.replaced(only, **changes):
        call()


class Own(nnx.BatchNorm):
    def __call__(self, x):
        return x


def gathering():
    model = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    return jaxbn.nnx.gather(model)


def stacked():
    make = nnx.vmap(lambda rngs: nnx.BatchNorm(3, rngs=rngs), in_axes=0)
    return make(nnx.Rngs(jax.random.split(jax.random.key(0))))


COMPILED = jax.jit(train)
LINEAR = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("mistake", "kind", "told"),
    [
        (lambda: jaxbn.nnx.replace(LINEAR), ValueError, "no batch norm"),
        (lambda: jaxbn.nnx.freeze(LINEAR), ValueError, "no batch norm"),
        (lambda: jaxbn.nnx.replace(Own(3, rngs=nnx.Rngs(0))), ValueError, "own class"),
        (lambda: jaxbn.nnx.freeze(Net(), "head/*"), ValueError, "'head/.*block/bn0, block"),
        (lambda: jaxbn.nnx.replace(Net(), only=nnx.Linear), ValueError, "fits none"),
        (lambda: jaxbn.nnx.unfreeze(Net()), ValueError, "none of these norms is frozen"),
        (
            lambda: jaxbn.nnx.replace(Net(), use_bias=False),
            TypeError,
            "no setting use_bias",
        ),
        (lambda: jaxbn.nnx.replace(Net(), jaxbn.BatchNorm()), TypeError, "lambda bn"),
        (lambda: jaxbn.nnx.replace(Net(), lambda bn: 3), TypeError, "takes a normalizer"),
        (
            lambda: jaxbn.nnx.replace(Net(), lambda _: jaxbn.BatchNorm(use_bias=False)),
            ValueError,
            "has a bias, for which",
        ),
        (lambda: jaxbn.nnx.replace(stacked(), jaxbn.BatchRenorm), ValueError, "stacked"),
        (lambda: jaxbn.nnx.replace(gathering()), ValueError, "track_gathered"),
        (lambda: jaxbn.nnx.freeze(gathering()), ValueError, "track_gathered"),
        (lambda: in_context("head/*"), ValueError, "fits none.*LinenBlock_0/BatchNorm_0"),
        (lambda: in_context(axis=1), TypeError, "no setting axis.*Choose from"),
        (lambda: in_context(call=lambda: None), ValueError, "no norm ran"),
        (
            lambda: (COMPILED(), in_context(call=COMPILED)),
            ValueError,
            "inside of a function that is jitted",
        ),
    ],
)
def test_mistakes_are_explained(mistake, kind, told):
    with pytest.raises(kind, match=told):
        mistake()


def test_a_mistake_leaves_the_model_as_it_was():
    model = Net()
    with pytest.raises(ValueError, match="no place"):
        jaxbn.nnx.replace(model, lambda bn: jaxbn.BatchNorm(use_bias=False))
    assert type(model.stem.layers[1]) is nnx.BatchNorm
