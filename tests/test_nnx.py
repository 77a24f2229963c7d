"""NNX: whatever Flax's layer does with an argument or a transform, ours does too."""

import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import errors, nnx, serialization
from flax.nnx import bridge
from jax.sharding import PartitionSpec

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from jaxbn._compat import set_value
from tests.test_linen import (
    EXAMPLES,
    NORMALIZERS,
    assert_close,
    kinds,
    lenient,
    pull,
)

# What Flax's NNX layer cannot do: it takes boolean masks alone, and cuts complex means to
# their real part.
OURS_ALONE = {"mask of integers", "complex input"}
newest = pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax did so from 0.12 on")


def arrays(module):
    return nnx.to_pure_dict(nnx.state(module))


def run_nnx(cls, example):
    """Returns what was made, the outputs in both modes, statistics and gradients."""
    x = example.x()
    size = example.shape[example.kwargs.get("axis", -1)]
    layer = cls(size, rngs=nnx.Rngs(1), **example.kwargs)
    made = arrays(layer)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        return pull(nnx.merge(graphdef, params, rest, copy=True)(x, mask=example.mask))

    grads = {}
    if jnp.issubdtype(x.dtype, jnp.floating):
        grads, by_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
        grads = nnx.to_pure_dict(grads), by_x
    y = layer(x, mask=example.mask)
    stats = arrays(layer)
    layer.eval()
    return made, y, stats, layer(example.x(2)), grads


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in OURS_ALONE])
def test_arguments_mean_what_they_mean_in_flax(name):
    example = EXAMPLES[name]
    got = run_nnx(jaxbn.nnx.BatchNorm, example)
    with lenient():
        want = run_nnx(nnx.BatchNorm, example)
    if hasattr(nnx, "view") or example.dtype != "bfloat16":  # resolved so from 0.12 on
        assert kinds(got[:4]) == kinds(want[:4])
    jax.tree.map(np.testing.assert_array_equal, got[0], want[0])
    assert_close(got, want, example.tolerance * (20 if example.tolerance > 1e-3 else 1))


@pytest.mark.parametrize("name", sorted(OURS_ALONE))
def test_what_flax_cannot_do(name):
    made, _, stats, inferred, _ = run_nnx(jaxbn.nnx.BatchNorm, EXAMPLES[name])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((stats, inferred)))
    assert kinds(made) == kinds(stats)


def test_several_axes():
    layer = jaxbn.nnx.BatchNorm((3, 2), axis=(1, -1), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 3, 5, 2))
    y = layer(x)
    assert layer.mean[...].shape == (3, 2)
    np.testing.assert_allclose(y.mean((0, 2)), jnp.zeros((3, 2)), atol=1e-5)


@newest
def test_arguments_and_call_are_those_of_flax_and_more():
    given = lambda f: [(p.name, p.kind, p.default) for p in parameters(f)]
    parameters = lambda f: inspect.signature(f).parameters.values()
    assert given(jaxbn.nnx.BatchNorm.__init__) == given(nnx.BatchNorm.__init__)
    ours, theirs = given(jaxbn.nnx.BatchNorm.__call__), given(nnx.BatchNorm.__call__)
    assert ours[: len(theirs)] == theirs
    made = [vars(cls(3, rngs=nnx.Rngs(0))) for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm)]
    assert set(made[0]) == set(made[1])


class Block(nnx.Module):
    """A dense layer and the norm, for inputs with 3 features."""

    def __init__(self, norm, *, rngs, **kwargs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.norm = norm(3, rngs=rngs, **kwargs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def plain(norm, x):
    model = Block(norm, rngs=nnx.Rngs(0))
    return model, model(x)


def jit(norm, x):
    model = Block(norm, rngs=nnx.Rngs(0))
    return model, nnx.jit(lambda model, x: model(x))(model, x)


def remat(norm, x):
    model = Block(norm, rngs=nnx.Rngs(0))
    forward = nnx.remat(lambda model, x: model(x))
    nnx.grad(lambda model, x: pull(forward(model, x)))(model, x)
    return model, forward(model, x)


def scan(norm, x):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return Block(norm, rngs=rngs)

    model = make(nnx.Rngs(0))
    run = nnx.scan(lambda x, model: model(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return model, run(x, model)


def scan_of_steps(norm, x):
    model = Block(norm, rngs=nnx.Rngs(0))
    axes = nnx.StateAxes({...: nnx.Carry})
    run = nnx.scan(lambda model, x: model(x), in_axes=(axes, 0), out_axes=0)
    return model, run(model, x)


def vmap_of_an_ensemble(norm, x):
    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def make(rngs):
        return Block(norm, rngs=rngs)

    model = make(nnx.Rngs(0))
    return model, nnx.vmap(lambda model, x: model(x))(model, x)


def vmap_with_an_axis_name(norm, x):
    model = Block(norm, rngs=nnx.Rngs(0), axis_name="batch")
    axes = nnx.StateAxes({...: None})
    forward = nnx.vmap(
        lambda model, x: model(x), in_axes=(axes, 0), out_axes=0, axis_name="batch"
    )
    return model, forward(model, x)


def shard_map(norm, x):
    model = Block(norm, rngs=nnx.Rngs(0), axis_name="batch")
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=kinds)
    specs = (nnx.StateSharding({...: PartitionSpec()}), PartitionSpec("batch"))
    forward = nnx.shard_map(
        lambda model, x: model(x), mesh=mesh, in_specs=specs, out_specs=specs[1]
    )
    return model, forward(model, x)


def split_and_merge(norm, x):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Block(norm, rngs=nnx.Rngs(0))))
    jax.tree.map(lambda leaf: leaf.shape, state)
    model = nnx.merge(graphdef, nnx.state(Block(norm, rngs=nnx.Rngs(0))))
    if hasattr(nnx, "view"):  # before, a Dense layer could not be pickled
        model = pickle.loads(pickle.dumps(nnx.clone(model)))
    return model, model(x)


TRANSFORMS = (
    plain,
    jit,
    remat,
    scan,
    scan_of_steps,
    vmap_of_an_ensemble,
    vmap_with_an_axis_name,
    shard_map,
    split_and_merge,
)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_nnx(transform):
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))

    def run(norm):
        model, y = transform(norm, x)
        return arrays(model), y

    got = run(jaxbn.nnx.BatchNorm)
    with lenient():
        want = run(nnx.BatchNorm)
    assert_close(got, want, 3e-5)


def test_states_of_flax_load_and_ours_load_into_flax():
    x = jax.random.normal(jax.random.key(0), (8, 3))
    ours, theirs = (
        cls(3, rngs=nnx.Rngs(0)) for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm)
    )
    for written, read in ((theirs, ours), (ours, theirs)):
        written(x + 1)
        nnx.update(read, nnx.state(written))
        jax.tree.map(np.testing.assert_array_equal, arrays(read), arrays(written))
        ours.eval(), theirs.eval()
        np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)
        ours.train(), theirs.train()


def test_modes_attributes_and_metadata():
    model = Block(
        jaxbn.nnx.BatchNorm,
        rngs=nnx.Rngs(0),
        scale_metadata={"tag": "scale"},
        axis_index_groups=((0, 1), (2, 3)),
    )
    assert model.norm.scale.tag == "scale"
    for change, flag in (
        (model.eval, True),
        (model.train, False),
        (lambda: model.set_attributes(use_running_average=True), True),
    ):
        change()
        assert model.norm.use_running_average is flag
    if hasattr(nnx, "view"):
        view = nnx.view(model, use_running_average=False)
        assert (view.norm.use_running_average, model.norm.use_running_average) == (0, 1)
        assert "use_running_average: bool | None" in nnx.view_info(model)
        assert view.norm.scale is model.norm.scale
    assert nnx.graphdef(model) == nnx.graphdef(nnx.clone(model))
    lifted = bridge.ToLinen(jaxbn.nnx.BatchNorm, args=(3,))
    variables = lifted.init(jax.random.key(0), jnp.ones((2, 3)))
    assert variables["batch_stats"]["mean"].shape == (3,)


def test_extra_keywords_and_what_differs_on_purpose():
    x = jax.random.normal(jax.random.key(0), (64, 3)) + 1e3
    layer = jaxbn.nnx.BatchNorm(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    before = arrays(layer)
    y = layer(x, update_stats=False)
    jax.tree.map(np.testing.assert_array_equal, arrays(layer), before)
    np.testing.assert_array_equal(layer(x, jnp.array(False)), y)
    # Neither x nor the statistics are rounded to the dtype of the result.
    np.testing.assert_allclose(layer.mean[...], 0.01 * np.asarray(x).mean(0), rtol=1e-5)
    exact = np.asarray(x, np.float64).var(0)
    np.testing.assert_allclose(layer.var[...], 0.99 + 0.01 * exact, rtol=1e-5)
    after = arrays(layer)
    layer(x.at[3].set(jnp.nan), weights=jnp.zeros(64))
    layer(jnp.full_like(x, jnp.inf))
    jax.tree.map(np.testing.assert_array_equal, arrays(layer), after)
    layer(x, weights=jnp.arange(64.0))
    # A function of the user's own decides about x, as in Flax.
    halved = jaxbn.nnx.BatchNorm(
        3, promote_dtype=lambda a, dtype: (a[0] / 2, *a[1:]), rngs=nnx.Rngs(0)
    )
    halved(x)
    np.testing.assert_allclose(halved.mean[...], 0.005 * np.asarray(x).mean(0), rtol=1e-5)


def layer_of(*args, **kwargs):
    return jaxbn.nnx.BatchNorm(*args, rngs=nnx.Rngs(0), **kwargs)


X = jnp.ones((4, 3))
MISTAKES = {
    "no mode": (
        lambda: layer_of(3, use_running_average=None)(X),
        ValueError,
        "use_running_average=not train",
    ),
    "feature count": (lambda: layer_of(5)(X), ValueError, r"\(4, 3\).*BatchNorm\(3, "),
    "unknown axis name": (
        lambda: layer_of(3, axis_name="batch")(X),
        NameError,
        "axis_name=.?'batch'",
    ),
    "name taken": (
        lambda: jaxbn.nnx.Norm(Taken(), 3),
        ValueError,
        "Give that field another name",
    ),
    "mask and weights": (
        lambda: layer_of(3)(X, mask=X, weights=X),
        ValueError,
        "weights=weights \\* mask",
    ),
    "no size, no rngs": (
        lambda: jaxbn.nnx.BatchNorm(),
        TypeError,
        r"x\.shape\[-1\].*rngs=nnx\.Rngs\(0\)",
    ),
    "no rngs": (lambda: jaxbn.nnx.BatchNorm(64), TypeError, r"rngs=nnx\.Rngs\(0\)"),
    "size by another name": (lambda: layer_of(features=64), TypeError, "num_features=64"),
    "eps": (lambda: layer_of(3, eps=0.5), TypeError, "epsilon=0.5"),
    "train for the layer": (
        lambda: layer_of(3, train=True),
        TypeError,
        "use_running_average=not train",
    ),
    "train in the call": (
        lambda: layer_of(3)(X, train=True),
        TypeError,
        "use_running_average=not train",
    ),
    "number for a mode": (
        lambda: layer_of(3, use_running_average=1),
        TypeError,
        "must be a bool, got 1",
    ),
    "text for a mode in the call": (
        lambda: layer_of(3)(X, "train"),
        TypeError,
        "must be a bool, got 'train'",
    ),
    "dtype": (lambda: layer_of(3, dtype="fp16"), TypeError, r"jnp\.float16"),
    "channels first": (lambda: layer_of(3)(jnp.ones((2, 3, 5, 5))), ValueError, "axis=1"),
    "size for any normalizer": (lambda: jaxbn.nnx.Norm(64), TypeError, "num_features"),
    "captured by nnx.jit": (
        lambda: nnx.jit(layer_of(3))(X),
        errors.TraceContextError,
        r"nnx\.jit\(lambda model, x: model\(x\)\)\(model, x\)",
    ),
    "captured by jax.grad": (
        lambda: jax.grad(functools.partial(sum_of, layer_of(3)))(X),
        errors.TraceContextError,
        "update_stats=False",
    ),
    "captured and restored": (
        lambda: nnx.jit(restore_that_captures(layer_of(3)))(X),
        errors.TraceContextError,
        "Pass the whole module",
    ),
    "captured and frozen": (
        lambda: jax.jit(freeze_that_captures(layer_of(3)))(X),
        errors.TraceContextError,
        "to freeze.*Pass the whole module",
    ),
    "captured by a loss": (
        lambda: jax.grad(loss_that_captures())(X),
        errors.TraceContextError,
        "Pass the whole module",
    ),
    "captured training state": (
        lambda: nnx.jit(step_that_captures())(X),
        errors.TraceContextError,
        r"nnx\.jit\(lambda model, x: model\(x\)\)\(model, x\)",
    ),
}


def sum_of(layer, x):
    return layer(x).sum()


def step_that_captures():
    state = jaxbn.nnx.TrainState(layer_of(3, use_running_average=True), optax.sgd(0.1))
    grads = jax.tree.map(jnp.zeros_like, nnx.state(state.model, nnx.Param))
    return lambda x: state.apply_gradients(grads)


def restore_that_captures(layer):
    return lambda x: sum_of(jaxbn.nnx.restore(layer, {**saved_of(layer), "mean": x[0]}), x)


def saved_of(layer):
    return nnx.to_pure_dict(nnx.state(layer))


def freeze_that_captures(layer):
    return lambda x: (jaxbn.nnx.freeze(layer), x)[1]


def loss_that_captures():
    state = jaxbn.nnx.TrainState(layer_of(3), optax.sgd(0.1))
    return lambda x: sum_of(state.model, x)


class Taken:
    def init(self, num_features):
        return {"normalizer": jnp.ones(num_features)}, None


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_with_a_remedy(name):
    make, error, remedy = MISTAKES[name]
    with pytest.raises(error, match=remedy):
        make()


@pytest.mark.parametrize("name", NORMALIZERS)
def test_norm_runs_any_normalizer(name):
    normalizer = NORMALIZERS[name]
    layer = jaxbn.nnx.Norm(normalizer, 3, rngs=nnx.Rngs(0))
    params, state = normalizer.init(3)
    forward = nnx.jit(lambda layer, x: layer(x))
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (8, 3))
        want, state = normalizer.apply(params, state, x, True)
        np.testing.assert_allclose(forward(layer, x), want, atol=1e-6)
    layer.eval()
    want, _ = normalizer.apply(params, state, x, False)
    np.testing.assert_allclose(layer(x), want, atol=1e-6)
    stats = nnx.state(layer, nnx.BatchStat)
    assert len(jax.tree.leaves(stats)) == len(jax.tree.leaves(state))


def train_state(features=3, seed=0):
    rngs = nnx.Rngs(seed)
    norm = jaxbn.nnx.BatchNorm(features, rngs=rngs)
    model = nnx.Sequential(
        nnx.Linear(3, features, rngs=rngs), norm, nnx.Dropout(0.1, rngs=rngs)
    )
    return jaxbn.nnx.TrainState(model, optax.sgd(0.1, momentum=0.9))


@nnx.jit
def train_step(state, x):
    def loss_fn(model):
        return jnp.square(model(x) - 2).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(state.model)
    state.apply_gradients(grads)
    return loss


def numbers(module):
    """Returns the arrays of a module, of which keys as their data."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, arrays(module)
    )


def test_a_state_that_orbax_read_without_a_target_is_restored(tmp_path):
    make = lambda dtype: jaxbn.nnx.BatchNorm(3, param_dtype=dtype, rngs=nnx.Rngs(0))
    layer = make(jnp.float32)
    layer(X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "0", nnx.state(layer))
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(tmp_path / "0")
    assert saved["mean"].keys() == {"value"}
    abstract = nnx.eval_shape(lambda: make(jnp.bfloat16))
    for target in (make(jnp.bfloat16), abstract):
        restored = jaxbn.nnx.restore(target, saved)
        assert isinstance(restored.scale[...], jax.Array)
        assert restored.scale[...].dtype == jnp.bfloat16
        np.testing.assert_array_equal(restored.mean[...], layer.mean[...])
    (found,) = convert.find_flax({"norm": saved}).layers.values()
    np.testing.assert_array_equal(found.state.mean, layer.mean[...])


@pytest.mark.parametrize("abstract", [False, True])
def test_numbers_of_keys_and_half_precision_are_restored(abstract):
    def make(dtype=jnp.float32):
        return nnx.Sequential(
            nnx.Linear(3, 3, param_dtype=dtype, rngs=nnx.Rngs(0)),
            nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
            jaxbn.nnx.BatchNorm(3, param_dtype=dtype, rngs=nnx.Rngs(0)),
        )

    def half():
        model = make(jnp.bfloat16)
        for variable in (model.layers[2].mean, model.layers[2].var):
            set_value(variable, variable[...].astype(jnp.bfloat16))
        return model

    saved = serialization.to_bytes(numbers(make()))
    target = nnx.eval_shape(half) if abstract else half()
    restored = jaxbn.nnx.restore(target, saved)
    norm = restored.layers[2]
    assert restored.layers[0].kernel[...].dtype == norm.scale[...].dtype == jnp.bfloat16
    assert norm.mean[...].dtype == norm.var[...].dtype == jnp.float32
    norm.mean[...] = norm.mean[...].at[0].set(5.0)
    with jax.numpy_dtype_promotion("standard"):
        assert restored(X).shape == X.shape
    _, left = jaxbn.nnx.restore(make(), {"layers": {"2": arrays(norm)}}, strict=False)
    assert set(left.kept) == {
        "layers/0/kernel", "layers/0/bias", "layers/1/rngs/count", "layers/1/rngs/key"
    }  # fmt: skip
    assert left.unused == ()


def test_a_checkpoint_comes_back_bit_for_bit_or_is_refused(tmp_path):
    state = train_state()
    train_step(state, X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "0", arrays(state))
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(tmp_path / "0")
    restored = jaxbn.nnx.restore(train_state(seed=1), saved)
    jax.tree.map(np.testing.assert_array_equal, numbers(restored), numbers(state))
    assert float(train_step(restored, X)) == float(train_step(state, X))

    other = train_state(features=4)
    before = numbers(other)
    with pytest.raises(ValueError, match=r"shape \(3,\) in the checkpoint and \(4,\)"):
        jaxbn.nnx.restore(other, saved)
    jax.tree.map(np.testing.assert_array_equal, numbers(other), before)
    saved["model"]["layers"].pop("1", None)
    with pytest.raises(ValueError, match="lacks model/layers/1"):
        jaxbn.nnx.restore(state, saved)
