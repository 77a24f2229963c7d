"""linen: whatever Flax's layer does with an argument or a transform, ours does too."""

import contextlib
import dataclasses
import inspect
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import errors, serialization
from jax.nn import initializers
from jax.sharding import PartitionSpec

import jaxbn
import jaxbn.linen
import jaxbn.nnx


@contextlib.contextmanager
def lenient():
    """Lets Flax promote and warn as it needs to; ours must not need it."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(action="ignore"),
    ):
        yield


@dataclasses.dataclass(frozen=True)
class Example:
    """Arguments of a layer, and an input for it."""

    kwargs: dict = dataclasses.field(default_factory=dict)
    shape: tuple = (8, 3)
    dtype: str = "float32"
    mask: object = None

    @property
    def tolerance(self):
        names = [str(jnp.dtype(v)) for k, v in self.kwargs.items() if "dtype" in k]
        half = {"bfloat16": 3e-2, "float16": 4e-3}
        return max(half.get(name, 3e-5) for name in [*names, self.dtype])

    def x(self, seed=0):
        x = jax.random.normal(jax.random.key(seed), self.shape) * 2 + 1
        if jnp.issubdtype(self.dtype, jnp.complexfloating):
            x = jax.lax.complex(x, x[::-1])
        return x.astype(self.dtype)


ROWS = np.arange(8)[:, None] % 3 > 0
# Every argument of Flax's layer, and every kind of input that it takes.
EXAMPLES = {
    "defaults": Example(),
    "momentum and epsilon": Example({"momentum": 0.5, "epsilon": 0.1}),
    "epsilon 0": Example({"epsilon": 0.0}),
    "axis 1": Example({"axis": 1}, (4, 3, 5)),
    "axis 0": Example({"axis": 0}, (3, 5)),
    "no bias": Example({"use_bias": False}),
    "no scale": Example({"use_scale": False}, dtype="bfloat16"),
    "no params": Example({"use_scale": False, "use_bias": False}, dtype="bfloat16"),
    "drawn params": Example(
        {"scale_init": initializers.normal(), "bias_init": initializers.normal()}
    ),
    "dtype": Example({"dtype": jnp.bfloat16}),
    "dtype and half input": Example({"dtype": jnp.float16}, dtype="bfloat16"),
    "half params": Example({"param_dtype": jnp.bfloat16}),
    "half params and input": Example({"param_dtype": jnp.bfloat16}, dtype="bfloat16"),
    "half input": Example(dtype="bfloat16"),
    "float16 input": Example(dtype="float16"),
    "integer input": Example(dtype="int32"),
    "complex input": Example({"dtype": jnp.complex64}, dtype="complex64"),
    "stable variance": Example({"use_fast_variance": False}),
    "images": Example(shape=(2, 4, 4, 3)),
    "videos": Example(shape=(2, 2, 2, 2, 3)),
    "mask of rows": Example(mask=ROWS),
    "mask of integers": Example(mask=ROWS.astype(np.int32)),
    "mask aligned from the right": Example(shape=(2, 8, 3), mask=ROWS),
    "groups alone": Example({"axis_index_groups": ((0,), (1,))}),
}
LINEN_EXAMPLES = {
    "several axes": Example({"axis": (1, -1)}, (4, 3, 5, 2)),
    "an axis twice": Example({"axis": [-1, 2]}, (4, 3, 5)),
    "no batch": Example(shape=(3,)),
    "statistics in half": Example(
        {"force_float32_reductions": False, "param_dtype": jnp.float16}, dtype="float16"
    ),
}


def kinds(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.asarray(leaf).dtype), tree)


def assert_close(got, want, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(leaf).astype(np.complex128) for leaf in (a, b))
        scale = np.abs(b).max(initial=1.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def pull(y):
    """Returns a loss whose gradients do not cancel."""
    weights = jax.random.normal(jax.random.key(7), y.shape)
    return jnp.sum(jnp.real(y).astype(jnp.float32) * weights)


def run_linen(cls, example):
    """Returns variables, output, statistics and gradients, of training and inference."""
    layer = cls(**example.kwargs)
    x = example.x()
    y0, variables = layer.init_with_output(
        jax.random.key(1), x, use_running_average=False, mask=example.mask
    )

    def train(params, x):
        y, updates = layer.apply(
            {**variables, "params": params},
            x,
            use_running_average=False,
            mask=example.mask,
            mutable=["batch_stats"],
        )
        return pull(y), (y, updates)

    run = lambda *arguments: ({}, train(*arguments)[1])
    if jnp.issubdtype(x.dtype, jnp.floating):
        run = jax.grad(train, argnums=(0, 1), has_aux=True)
    grads, (y, updates) = jax.jit(run)(variables.get("params", {}), x)
    inferred = layer.apply({**variables, **updates}, example.x(2), use_running_average=True)
    return variables, y0, y, updates, inferred, grads


@pytest.mark.parametrize("name", [*EXAMPLES, *LINEN_EXAMPLES])
def test_arguments_mean_what_they_mean_in_flax(name):
    example = {**EXAMPLES, **LINEN_EXAMPLES}[name]
    got = run_linen(jaxbn.linen.BatchNorm, example)
    with lenient():
        want = run_linen(nn.BatchNorm, example)
    complex_mean = "complex" in name  # ours is complex from the start, Flax's soon
    for a, b in list(zip(got, want, strict=True))[complex_mean:5]:
        assert kinds(a) == kinds(b)
    assert_close(got, want, example.tolerance * (20 if example.tolerance > 1e-3 else 1))
    # The same keys draw the same params, bit for bit.
    jax.tree.map(
        np.testing.assert_array_equal, got[0]["batch_stats"], want[0]["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, got[0].get("params"), want[0].get("params"))


def test_fields_and_call_are_those_of_flax_and_more():
    fields = lambda cls: [(f.name, f.default) for f in dataclasses.fields(cls)]
    ours, theirs = fields(jaxbn.linen.BatchNorm), fields(nn.BatchNorm)
    assert ours[: len(theirs) - 2] == theirs[:-2]  # the last two are parent and name
    assert ours[-2:] == theirs[-2:]
    call = lambda cls: list(inspect.signature(cls.__call__).parameters)
    assert call(jaxbn.linen.BatchNorm)[: len(call(nn.BatchNorm))] == call(nn.BatchNorm)


class Block(nn.Module):
    """A dense layer and the norm, with a value sown beside it."""

    norm: type
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(3)(x)
        x = self.norm(use_running_average=not train, axis_name=self.axis_name)(x)
        self.sow("intermediates", "normalized", x)
        return x


def scanned(norm, x):
    body = nn.scan(
        lambda block, carry, _: (block(carry), None),
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=3,
    )

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(Block(norm), x, None)[0]

    return Deep()


def carried(norm, x):
    """Scans over steps that share the layer: the statistics are the carry."""

    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                lambda block, carry, _: (block(carry), None),
                variable_broadcast="params",
                variable_carry="batch_stats",
                variable_axes={"intermediates": 0},
                split_rngs={"params": False},
                length=3,
            )
            block = Block(norm)
            return block(x) if self.is_initializing() else body(block, x, None)[0]

    return Repeated()


def mapped(norm, x):
    axes = {"params": None, "batch_stats": None, "intermediates": 0}
    split = {"params": False}
    return nn.vmap(Block, variable_axes=axes, split_rngs=split, axis_name="batch")(
        norm, axis_name="batch"
    )


def ensemble(norm, x):
    axes = {"params": 0, "batch_stats": 0, "intermediates": 0}
    return nn.vmap(Block, variable_axes=axes, split_rngs={"params": True})(norm)


def shared(norm, x):
    class Siamese(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = Block(norm)
            return block(x) - block(2 * x)

    return Siamese()


MODELS = {
    "plain": lambda norm, x: Block(norm),
    "scan": scanned,
    "scan of steps": carried,
    "vmap with an axis name": mapped,
    "vmap of an ensemble": ensemble,
    "remat": lambda norm, x: nn.remat(Block)(norm),
    "jit": lambda norm, x: nn.jit(Block)(norm),
    "shared": shared,
}


def run_model(make, norm):
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    model = make(norm, x)
    variables = model.init(jax.random.key(1), x)
    lazy = model.lazy_init(jax.random.key(1), jax.ShapeDtypeStruct(x.shape, x.dtype))
    jax.tree.map(np.testing.assert_allclose, lazy, variables)
    variables = {k: v for k, v in variables.items() if k != "intermediates"}
    collections = ["batch_stats", "intermediates"]
    table = model.tabulate(jax.random.key(1), x, console_kwargs={"width": 200})
    y, updates = model.apply(variables, x, mutable=collections)
    bound = model.bind(variables, mutable=collections)
    np.testing.assert_allclose(bound(x), y, rtol=1e-6)

    def loss(params):
        return pull(model.apply({**variables, "params": params}, x, mutable=collections)[0])

    grads = jax.jit(jax.grad(loss))(variables["params"])
    return (variables, y, updates, grads), table


@pytest.mark.parametrize("name", MODELS)
def test_transforms_of_linen(name):
    got, table = run_model(MODELS[name], jaxbn.linen.BatchNorm)
    with lenient():
        want, their_table = run_model(MODELS[name], nn.BatchNorm)
    assert_close(got, want, 2e-5)
    assert table == their_table


def test_checkpoints_of_flax_load_and_ours_load_into_flax():
    x = jax.random.normal(jax.random.key(0), (8, 3))

    def trained(norm):
        model = Block(norm)
        variables = model.init(jax.random.key(1), x)
        _, updates = model.apply(variables, x, mutable=["batch_stats"])
        return model, {"params": variables["params"], **updates}

    layers = [trained(norm) for norm in (jaxbn.linen.BatchNorm, nn.BatchNorm)]
    for (_, written), (model, own) in (layers, layers[::-1]):
        read = serialization.from_bytes(own, serialization.to_bytes(written))
        jax.tree.map(np.testing.assert_array_equal, read, written)
        y = model.apply(read, x, train=False)
        np.testing.assert_allclose(y, layers[0][0].apply(read, x, train=False), atol=1e-5)


def test_partitioning_boxes_stay_around_the_params():
    init = nn.with_partitioning(initializers.ones, ("model",))
    layer = jaxbn.linen.BatchNorm(False, scale_init=init)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    assert nn.get_partition_spec(variables)["params"]["scale"] == PartitionSpec("model")
    layer.apply(variables, jnp.ones((2, 3)), mutable=["batch_stats"])


def step(layer, variables, x, **kwargs):
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **kwargs)
    return y, updates["batch_stats"]


def test_extra_keywords():
    layer = jaxbn.linen.BatchNorm()
    x = jax.random.normal(jax.random.key(0), (8, 3))
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    y, stats = step(layer, variables, x, use_running_average=False)
    # Neither a mutable collection nor anything else changes without an update.
    same = layer.apply(variables, x, use_running_average=False, update_stats=False)
    np.testing.assert_array_equal(same, y)
    for flag, want_y, want_stats in (
        (False, y, stats),
        (
            True,
            layer.apply(variables, x, use_running_average=True),
            variables["batch_stats"],
        ),
    ):
        traced = jax.jit(lambda f: step(layer, variables, x, use_running_average=f))
        got_y, got_stats = traced(jnp.array(flag))
        np.testing.assert_allclose(got_y, want_y, atol=1e-6)
        assert_close(got_stats, want_stats, 1e-6)
    rows = jnp.array([2.0, 0, 1, 1, 0, 1, 1, 1])
    _, weighed = step(
        layer, variables, x.at[1].set(jnp.nan), use_running_average=False, weights=rows
    )
    _, repeated = step(layer, variables, x[jnp.array([0, 0, 2, 3, 5, 6, 7])],
                       use_running_average=False)  # fmt: skip
    assert_close(weighed, repeated, 1e-6)


def test_statistics_that_were_cast_to_half_precision_do_not_stall():
    layer = jaxbn.linen.BatchNorm(False, momentum=0.999)
    variables = layer.init(jax.random.key(0), X)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    for _ in range(3):
        _, stats = step(layer, variables, X)
        variables = {**variables, "batch_stats": stats}
    want = X.mean(0) * (1 - 0.999**3)
    assert stats["mean"].dtype == jnp.float32
    np.testing.assert_allclose(stats["mean"], want, rtol=1e-3)


def test_what_differs_on_purpose():
    layer = jaxbn.linen.BatchNorm(False)
    x = jax.random.normal(jax.random.key(0), (64, 3))
    variables = layer.init(jax.random.key(0), x)
    # The variance keeps its digits.
    _, stats = step(layer, variables, x + 1e3)
    want = 0.99 + 0.01 * np.asarray(x + 1e3, np.float64).var(0)
    np.testing.assert_allclose(stats["var"], want, rtol=1e-6)
    # A batch that is not finite, or masked as a whole, leaves the statistics alone.
    for bad, mask in ((x.at[0, 0].set(jnp.inf), None), (x, jnp.zeros((64, 1), bool))):
        _, stats = step(layer, variables, bad, mask=mask)
        assert np.isfinite(stats["mean"]).all()
        assert (stats["mean"][0], stats["var"][0]) == (0, 1)
    # A mask over devices counts what it selects on all of them.
    mask = jnp.arange(64) < 20
    spread = jaxbn.linen.BatchNorm(False, axis_name="device")

    def on_device(x, mask):
        return step(spread, variables, x, mask=mask[:, None])[1]

    over_devices = jax.vmap(on_device, axis_name="device")
    stats = over_devices(x.reshape(4, 16, 3), mask.reshape(4, 16))
    _, want = step(layer, variables, x[:20])
    assert_close(jax.tree.map(lambda leaf: leaf[3], stats), want, 1e-6)


X = jnp.ones((4, 3))
LAYER = jaxbn.linen.BatchNorm()
VARIABLES = LAYER.init(jax.random.key(0), X, use_running_average=True)
KEY = jax.random.key(0)
MISTAKES = {
    "no mode": (lambda: LAYER.apply(VARIABLES, X), ValueError, "use_running_average=not"),
    "mode twice": (
        lambda: jaxbn.linen.BatchNorm(True).apply(VARIABLES, X, True),
        ValueError,
        "got both",
    ),
    "no statistics": (
        lambda: LAYER.apply({"params": VARIABLES["params"]}, X, True),
        errors.ScopeCollectionNotFound,
        "'batch_stats': batch_stats",
    ),
    "not mutable": (
        lambda: LAYER.apply(VARIABLES, X, False),
        errors.ModifyScopeVariableError,
        r"mutable=\['batch_stats'\]",
    ),
    "unknown axis name": (
        lambda: step(jaxbn.linen.BatchNorm(False, axis_name="batch"), VARIABLES, X),
        NameError,
        "axis_name=.?'batch'",
    ),
    "mask and weights": (
        lambda: step(LAYER, VARIABLES, X, use_running_average=False, mask=X, weights=X),
        ValueError,
        "weights=weights \\* mask",
    ),
    "axis out of range": (
        lambda: step(jaxbn.linen.BatchNorm(False, axis=2), VARIABLES, X),
        ValueError,
        "rank 2",
    ),
    "momentum None": (
        lambda: step(jaxbn.linen.BatchNorm(False, momentum=None), VARIABLES, X),
        TypeError,
        r"Norm\(jaxbn.BatchNorm\(momentum=None\)",
    ),
    "size for a mode": (
        lambda: jaxbn.linen.BatchNorm(64),
        TypeError,
        "must be a bool, got 64.*takes it from x",
    ),
    "number for a mode in the call": (
        lambda: LAYER.apply(VARIABLES, X, 1),
        TypeError,
        "must be a bool, got 1",
    ),
    "size by name": (
        lambda: jaxbn.linen.BatchNorm(num_features=64),
        TypeError,
        "nothing instead: the layer takes the number of features from x",
    ),
    "eps": (lambda: jaxbn.linen.BatchNorm(eps=0.5), TypeError, "epsilon=0.5"),
    "decay": (lambda: jaxbn.linen.BatchNorm(decay=0.5), TypeError, "momentum=0.5"),
    "center": (lambda: jaxbn.linen.BatchNorm(center=False), TypeError, "use_bias=False"),
    "feature_axes": (
        lambda: jaxbn.linen.BatchNorm(feature_axes=1),
        TypeError,
        "Write axis, the feature axis",
    ),
    "train for the layer": (
        lambda: jaxbn.linen.BatchNorm(train=True),
        TypeError,
        "use_running_average=not train",
    ),
    "train in the call": (
        lambda: LAYER.apply(VARIABLES, X, train=True),
        TypeError,
        "use_running_average=not train",
    ),
    "mask for any normalizer": (
        lambda: jaxbn.linen.Norm(jaxbn.BatchNorm()).init(KEY, X, False, mask=X > 0),
        TypeError,
        "weights=",
    ),
    "dtype": (lambda: jaxbn.linen.BatchNorm(dtype="bf16"), TypeError, r"jnp\.bfloat16"),
    "size for any normalizer": (lambda: jaxbn.linen.Norm(64), TypeError, "BatchNorm()"),
    "no normalizer": (lambda: jaxbn.linen.Norm(), TypeError, "such as jaxbn.BatchNorm"),
    "channels first": (
        lambda: LAYER.apply(VARIABLES, jnp.ones((2, 3, 5, 5)), True),
        errors.ScopeParamShapeError,
        "axis=1",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_with_a_remedy(name):
    make, error, remedy = MISTAKES[name]
    with pytest.raises(error, match=remedy):
        make()


class Center:
    """A normalizer that a user wrote: params None, state a bare array."""

    def init(self, num_features):
        return None, jnp.zeros((1, num_features))

    def apply(self, params, state, x, training):
        mean = x.mean(0, keepdims=True) if training else state
        return x - mean, 0.9 * state + 0.1 * mean if training else state


NORMALIZERS = {
    "batch norm": jaxbn.BatchNorm(feature_axes=-1),
    "cumulative": jaxbn.BatchNorm(momentum=None),
    "renorm": jaxbn.BatchRenorm(jaxbn.BatchNorm()),
    "ghost": jaxbn.GhostBatchNorm(jaxbn.BatchRenorm(jaxbn.BatchNorm()), 4),
    "a user's own": Center(),
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_norm_runs_any_normalizer(name):
    normalizer = NORMALIZERS[name]
    layer = jaxbn.linen.Norm(normalizer)
    params, state = normalizer.init(3)
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (8, 3))
        want, state = normalizer.apply(params, state, x, True)
        y, stats = step(layer, variables, x, use_running_average=False)
        variables = {**variables, "batch_stats": stats}
        np.testing.assert_allclose(y, want, atol=1e-6)
    assert_close(jax.tree.leaves(stats), jax.tree.leaves(_by_name(state)), 1e-6)
    want, _ = normalizer.apply(params, state, x, False)
    y = layer.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(y, want, atol=1e-6)


def _by_name(state):
    return state._asdict() if hasattr(state, "_asdict") else state


def test_norm_of_batch_norm_has_the_tree_of_batch_norm():
    norm = jaxbn.linen.Norm(NORMALIZERS["batch norm"], use_running_average=False)
    init_zeros = norm.clone(init_options={"scale_init": initializers.zeros})
    variables = init_zeros.init(jax.random.key(0), X)
    assert kinds(variables) == kinds(VARIABLES)
    np.testing.assert_array_equal(variables["params"]["scale"], jnp.zeros(3))


@dataclasses.dataclass(frozen=True)
class RootMeanSquareNorm(jaxbn.Normalizer):
    """A normalizer of one's own, written with the protocol alone."""

    momentum: float = 0.5

    def init(self, num_features):
        ones = jnp.ones(num_features)
        return {"gain": ones}, jaxbn.BatchStats(0 * ones, ones)

    def standardize(self, mean, var):
        inverse = jax.lax.rsqrt(mean**2 + var + 1e-6)
        return inverse, mean * inverse

    def scale_and_bias(self, params):
        return params["gain"], None

    def track(self, state, batch):
        return jaxbn.update_running(state, batch, momentum=self.momentum)


def test_a_normalizer_of_ones_own_is_a_full_citizen():
    layer = jaxbn.linen.Norm(RootMeanSquareNorm())
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    assert set(variables["params"]) == {"gain"}
    y, stats = step(layer, variables, X, use_running_average=False)
    wide = np.asarray(X, np.float64)
    np.testing.assert_allclose(y, wide / np.sqrt((wide**2).mean(0) + 1e-6), atol=1e-5)
    np.testing.assert_allclose(stats["mean"], wide.mean(0) / 2, rtol=1e-5)

    gathered = jaxbn.linen.gather(variables["batch_stats"])
    for part in jnp.split(X, 2):
        _, gathered = step(
            layer, {**variables, "batch_stats": gathered}, part, use_running_average=False
        )
    assert_close(jaxbn.linen.track_gathered(gathered), stats, 1e-5)
    batches = jnp.split(X, 2)
    stats = jaxbn.linen.reestimate(
        layer.apply, variables, batches, use_running_average=False
    )
    np.testing.assert_allclose(stats["var"], wide.var(0), rtol=1e-5)

    module = jaxbn.nnx.Norm(RootMeanSquareNorm(), 3)
    module = jaxbn.nnx.reestimate(module, batches)
    np.testing.assert_allclose(module.var[...], wide.var(0), rtol=1e-5)
    module = jaxbn.nnx.gather(module)
    module(X)
    assert jaxbn.nnx.track_gathered(module).gain.shape == (3,)


def train_state(features=3, seed=0):
    model = nn.Sequential([nn.Dense(features), jaxbn.linen.BatchNorm(False)])
    variables = model.init(jax.random.key(seed), X)
    tx = optax.adam(1e-3)
    return jaxbn.linen.TrainState.create(apply_fn=model.apply, tx=tx, **variables)


@lenient()  # for Adam, which raises a float to the power of an integer
@jax.jit
def train_step(state, x):
    def loss_fn(params):
        y, batch_stats = state.apply(params, x)
        return jnp.square(y - x).mean(), batch_stats

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


def test_the_train_state_cannot_lose_statistics():
    state, _ = train_step(train_state(), X)
    assert float(state.batch_stats["layers_1"]["var"][0]) < 1
    grads = jax.tree.map(jnp.zeros_like, state.params)
    with pytest.raises(TypeError, match="batch_stats"):
        state.apply_gradients(grads=grads)
    with pytest.raises(ValueError, match=r"updates\['batch_stats'\]"):
        state.apply_gradients(grads=grads, batch_stats=state.variables)
    with pytest.raises(TypeError, match="batch_stats"):
        jaxbn.linen.TrainState.create(apply_fn=state.apply_fn, params={}, tx=state.tx)


def test_the_train_state_returns_further_collections_as_flax_does():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jaxbn.linen.BatchNorm(False)(x)
            self.sow("losses", "l1", jnp.abs(x).mean())
            return x

    model = Model()
    variables = model.init(jax.random.key(0), X)
    state = jaxbn.linen.TrainState.create(
        apply_fn=model.apply,
        tx=optax.sgd(1.0),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
    )
    for mutable in ("losses", ["losses"], ["batch_stats", "losses"]):
        _, updates = state.apply(state.params, X, mutable=mutable)
        assert set(updates) == {"batch_stats", "losses"}
        _, batch_stats = state.apply(state.params, X)
        jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], batch_stats)


def test_restored_arrays_have_the_dtypes_and_the_shardings_of_the_target():
    mesh = jax.make_mesh((3,), ("model",), devices=jax.devices()[:3])
    sharded = jax.sharding.NamedSharding(mesh, PartitionSpec("model"))
    layer = jaxbn.linen.BatchNorm(True, param_dtype=jnp.bfloat16)
    saved = jax.tree.map(lambda leaf: np.full(3, 0.5, np.float32), VARIABLES)
    target = layer.init(jax.random.key(0), X)
    abstract = jax.eval_shape(layer.init, jax.random.key(0), X)
    for like in (target, abstract, jax.device_put(target, sharded)):
        restored = jaxbn.linen.restore(like, saved)
        assert kinds(restored) == kinds(target)
        for leaf, old in zip(*map(jax.tree.leaves, (restored, like)), strict=True):
            assert isinstance(leaf, jax.Array)
            assert leaf.sharding == (old.sharding or jnp.ones(3).sharding)
            assert leaf.committed == getattr(old, "committed", False)
            assert (leaf == 0.5).all()


def test_restored_statistics_are_float32_or_wider_and_nothing_overflows():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), VARIABLES)
    for saved in (VARIABLES, half):
        for like in (half, jax.eval_shape(lambda: half)):
            restored = jaxbn.linen.restore(like, saved)
            dtypes = jax.tree.map(lambda leaf: str(leaf.dtype), restored)
            assert set(dtypes["batch_stats"].values()) == {"float32"}
            assert set(dtypes["params"].values()) == {"bfloat16"}
    large = jax.tree.map(lambda leaf: np.full(3, 1e6, np.float32), VARIABLES)
    tree = {
        "float16": ({"a": jnp.ones(3, jnp.float16)}, {"a": np.float32(1e6) * np.ones(3)}),
        "complex64": ({"a": jnp.ones(3)}, {"a": np.ones(3, np.complex64)}),
        "float64": ({"a": jnp.ones(3, int)}, {"a": np.ones(3) / 2}),
        "int64": ({"a": jnp.ones(3, int)}, {"a": np.full(3, 2**40)}),
    }
    for name, (target, saved) in tree.items():
        with pytest.raises(ValueError, match=f"a is .*{name}.*do not fit"):
            jaxbn.linen.restore(target, saved)
    assert jaxbn.linen.restore({"a": jnp.ones(3, int)}, {"a": np.full(3, 7)})["a"][0] == 7
    half_params = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), VARIABLES)
    with pytest.raises(ValueError, match="float16"):
        jaxbn.linen.restore(half_params, large)


def test_an_abstract_model_of_a_mesh_is_restored_onto_its_devices():
    kind = (jax.sharding.AxisType.Explicit,)
    devices = jax.devices()[:3]
    mesh = jax.make_mesh((3,), ("model",), axis_types=kind, devices=devices)
    sharded = jax.sharding.NamedSharding(mesh, PartitionSpec("model"))
    target = jax.device_put(VARIABLES, sharded)
    abstract = jax.eval_shape(lambda: target)
    saved = jax.tree.map(np.asarray, VARIABLES)
    with jax.set_mesh(mesh):
        restored = jaxbn.linen.restore(abstract, saved)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {sharded}
    with pytest.raises(ValueError, match=r"devices.*jax\.set_mesh\(mesh\)"):
        jaxbn.linen.restore(abstract, saved)


def test_a_partial_restore_tells_what_was_left():
    target = {"a": {"value": jnp.ones(2), "key": jnp.ones(3)}, "new": jnp.ones(1)}
    saved = {"a": {"value": np.zeros(2), "key": np.zeros(4)}, "old": np.ones(1)}
    restored, left = jaxbn.linen.restore(target, saved, strict=False)
    assert left == (("new", "a/key"), ("old", "a/key"))
    assert (left.kept, left.unused) == left
    want = {"a": {"value": jnp.zeros(2), "key": jnp.ones(3)}, "new": jnp.ones(1)}
    jax.tree.map(np.testing.assert_array_equal, restored, want)
    with pytest.raises(ValueError, match="holds old, of which the model has no leaf"):
        jaxbn.linen.restore(target, {"old": X}, strict=False)
    with pytest.raises(ValueError, match="strict=False"):
        jaxbn.linen.restore(target, saved)


def test_bytes_of_flax_are_restored_and_what_is_no_tree_is_refused():
    state, _ = train_step(train_state(), X)
    restored = jaxbn.linen.restore(train_state(seed=1), serialization.to_bytes(state))
    numbers = [serialization.to_state_dict(each) for each in (restored, state)]
    jax.tree.map(np.testing.assert_array_equal, *numbers)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.params))
    with pytest.raises(TypeError, match="got None"):
        jaxbn.linen.restore(VARIABLES, None)


def test_a_checkpoint_comes_back_bit_for_bit_or_is_refused(tmp_path):
    state, _ = train_step(train_state(), X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "0", serialization.to_state_dict(state))
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(tmp_path / "0")
    restored = jaxbn.linen.restore(train_state(seed=1), saved)
    assert int(restored.step) == 1
    written, read = map(serialization.to_state_dict, (state, restored))
    jax.tree.map(np.testing.assert_array_equal, read, written)
    assert kinds(train_step(restored, X)[1]) == kinds(train_step(state, X)[1])

    other = train_state(features=4)
    before = jax.tree.map(np.array, other)
    with pytest.raises(ValueError, match=r"shape \(3,\) in the checkpoint and \(4,\)"):
        jaxbn.linen.restore(other, saved)
    jax.tree.map(np.testing.assert_array_equal, other, before)
    with pytest.raises(ValueError, match="lacks batch_stats/layers_1/mean"):
        jaxbn.linen.restore(state, {k: v for k, v in saved.items() if k != "batch_stats"})
    with pytest.raises(ValueError, match="holds more"):
        jaxbn.linen.restore(state, {**saved, "more": X})
