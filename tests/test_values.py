"""Values are canonical and travel whole; concrete arrays are taken wherever numbers are."""

import contextlib
import copy
import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.optim
from jaxbn import BatchRenorm, RenormLimits, convert, tf1
from jaxbn._layers import batch_norm, batch_renorm

try:
    import cloudpickle
except ImportError:  # it is no dependency of anything here
    cloudpickle = pickle

X = 3 + 2 * jax.random.normal(jax.random.key(1), (8, 2))
BN = jaxbn.BatchNorm()
PARAMS, STATE = BN.init(2)
SPELLINGS = (np.float64, np.float32, np.array, lambda n: np.array(n, "f"), jnp.float32)
RENORM = jaxbn.BatchRenorm()

# Each value by its field of numbers, and another number for it.
NUMBERS = {
    "momentum": (lambda n: jaxbn.BatchNorm(momentum=n), 0.75, "momentum"),
    "epsilon": (lambda n: jaxbn.BatchNorm(epsilon=n), 0.5, "epsilon"),
    "renorm": (lambda n: jaxbn.BatchRenorm(momentum=n), 0.75, "momentum"),
    "limit": (lambda n: BatchRenorm(limits=RenormLimits(r_max=n)).limits, 4.0, "r_max"),
    "ema": (lambda n: jaxbn.Ema(n), 0.75, "decay"),
    "average": (lambda n: jaxbn.optim.ModelAverage(n), 0.75, "decay"),
    "tf1": (lambda n: tf1.batch_norm(decay=n), 0.75, "decay"),
    "tf1_epsilon": (lambda n: tf1.batch_norm(epsilon=n).settings, 0.5, "epsilon"),
    "tf1_ema": (lambda n: tf1.ExponentialMovingAverage(n), 0.75, "decay"),
}  # fmt: skip
WHOLE = {
    "ddof": (lambda n: jaxbn.BatchNorm(ddof=n), "ddof"),
    "ghosts": (lambda n: jaxbn.GhostBatchNorm(BN, n), "virtual_batch_size"),
    "tf1": (
        lambda n: tf1.batch_normalization(virtual_batch_size=n).settings,
        "virtual_batch_size",
    ),
}
FLAGS = {
    "use_scale": lambda f: jaxbn.BatchNorm(use_scale=f),
    "use_bias": lambda f: jaxbn.BatchNorm(use_bias=f),
    "debias": lambda f: jaxbn.BatchNorm(debias=f),
    "center": lambda f: tf1.batch_normalization(center=f).settings,
    "scale": lambda f: tf1.batch_norm(scale=f).settings,
    "zero_debias": lambda f: tf1.batch_norm(zero_debias_moving_mean=f).settings,
    "trainable": lambda f: tf1.batch_normalization(trainable=f),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("case", NUMBERS)
def test_a_number_is_pythons_whatever_it_was_made_from(case, spelling):
    make, number, field = NUMBERS[case]
    value = make(spelling(number))
    assert type(getattr(value, field)) is float
    assert getattr(value, field) == number
    if type(value).__eq__ is not object.__eq__:
        assert (value, hash(value)) == (make(number), hash(make(number)))
    assert repr(value) == repr(make(number))


@pytest.mark.parametrize("wrong", ["1e-5", "nan", True, 1j, np.ones(2), None, [0.5]])
@pytest.mark.parametrize("case", NUMBERS)
def test_what_is_no_number_is_refused_by_its_field(case, wrong):
    make, _, field = NUMBERS[case]
    if wrong is None and case in ("momentum", "average"):
        return
    with pytest.raises(TypeError, match=rf"{field} must be .*got .*\. [A-Z]"):
        make(wrong)


@pytest.mark.parametrize("case", WHOLE)
def test_an_int_is_pythons_and_all_else_is_refused(case):
    make, field = WHOLE[case]
    for spelling in (np.int64, np.int8, np.array, jnp.array):
        assert type(getattr(make(spelling(1)), field)) is int
    for wrong in ("1", 1.0, True, np.ones(1, int)):
        with pytest.raises(TypeError, match=f"{field} must be an int, got"):
            make(wrong)


@pytest.mark.parametrize("field", FLAGS)
def test_a_flag_is_a_bool_and_all_else_is_refused(field):
    for flag in (True, False):
        for spelling in (np.bool_, np.array, jnp.array):
            assert getattr(FLAGS[field](spelling(flag)), field) is flag
    for wrong in ("false", 0, 1.0, np.array([True])):
        with pytest.raises(TypeError, match=f"{field}.* must be a bool, got"):
            FLAGS[field](wrong)


@pytest.mark.parametrize("first", [0, 1])
def test_equal_values_neither_retrace_nor_depend_on_which_came_first(first, x64):
    made = [np.float64(0.8), 0.8]
    values = [
        jaxbn.BatchNorm(momentum=m, debias=True) for m in (made[first], made[1 - first])
    ]
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def step(bn, state):
        traces.append(bn)
        return bn.apply(PARAMS, state, X.astype(jnp.float32), True)[1]

    for bn in values:
        state = bn.init(2)[1]
        assert step(bn, state).weight.dtype == state.weight.dtype == jnp.float32
    assert len(traces) == 1


def local(x):
    return 2 * x


jitted = jax.jit(local)
partial = functools.partial(jax.nn.leaky_relu, negative_slope=0.3)
VALUES = [
    *(jaxbn.BatchNorm(activation=f) for f in (jax.nn.relu, jax.nn.silu, jnp.tanh, local)),
    jaxbn.BatchNorm(activation=partial),
    jaxbn.BatchNorm(momentum=None, dtype="bfloat16", param_dtype=jnp.float16),
    jaxbn.BatchNorm(axis_name=("a", "b"), feature_axes=[1, 2]),
    jaxbn.BatchRenorm(
        jaxbn.BatchNorm(activation=jax.nn.relu), limits=jaxbn.RenormLimits(r_max=9)
    ),
    jaxbn.Gather(jaxbn.GhostBatchNorm(jaxbn.BatchNorm(epsilon=0.1), 4, layout="strided")),
    convert.EmaBatchNorm(jaxbn.BatchNorm(activation=jax.nn.gelu)),
    jaxbn.Ema(0.9, debias=True),
    jaxbn.optim.ModelAverage(0.5),
    tf1.batch_norm(epsilon=0.5).settings,
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_value_travels_whole(value):
    ways = [copy.copy, copy.deepcopy]
    for module in (pickle, cloudpickle):
        ways += [lambda v, m=module: m.loads(m.dumps(v))]
    for way in ways:
        there = way(value)
        assert (there, hash(there)) == (value, hash(value))
        assert getattr(there, "activation", 0) is getattr(value, "activation", 0)


def test_jitted_functions_of_users_travel_too():
    assert (
        pickle.loads(pickle.dumps(jaxbn.BatchNorm(activation=jitted))).activation is jitted
    )
    layer = tf1.batch_norm(activation_fn=jax.nn.relu)
    assert pickle.loads(pickle.dumps(layer)).activation_fn is jax.nn.relu


def test_partials_are_equal_where_their_parts_are():
    def layer(*args, **words):
        return jaxbn.BatchNorm(activation=functools.partial(*args, **words))

    clip = jnp.clip
    first = layer(clip, min=0.0, max=6.0)
    assert first == layer(clip, max=6.0, min=0.0)
    assert hash(first) == hash(layer(clip, min=0.0, max=6.0))
    for other in (layer(clip, min=0.0, max=5.0), layer(clip, min=0, max=6), layer(clip)):
        assert other != first
    # An array has no hash: such a partial equals itself alone.
    assert layer(clip, max=jnp.ones(2)) != layer(clip, max=jnp.ones(2))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Own(jaxbn.Normalizer):
    activation: object = jax.nn.relu


def test_a_normalizer_of_ones_own_travels_too():
    for way in (copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))):
        assert way(Own()) == Own()
        assert way(Own()).activation is jax.nn.relu


def test_a_value_prints_what_differs_from_its_defaults_and_reads_back():
    assert repr(jaxbn.BatchNorm()) == "BatchNorm()"
    assert repr(jaxbn.BatchNorm(momentum=np.float64(0.9))) == "BatchNorm(momentum=0.9)"
    assert repr(jaxbn.RenormLimits()) == "RenormLimits()"
    bn = jaxbn.BatchNorm(activation=jax.nn.relu, dtype=jnp.bfloat16)
    assert repr(bn) == "BatchNorm(activation=jax.nn.relu, dtype='bfloat16')"
    names = {**vars(jaxbn), **vars(convert), **vars(jaxbn.optim), "jax": jax}
    names["functools"] = functools
    for value in VALUES[:3] + VALUES[4:-1]:
        assert eval(repr(value), names) == value


def concrete_uses(make):
    """Returns functions of x in which `make` makes every number an array."""
    renorm = RENORM.init(2)
    ema = jaxbn.Ema(0.9)
    average = ema.init(X)
    limits = jaxbn.RenormLimits(make(0.5), make(2.0), make(1.0))
    old = tf1.batch_norm(decay=make(0.5))
    weights = np.ones(8, "f")
    return {
        "momentum": lambda x: BN.apply(PARAMS, STATE, x, True, momentum=make(0.5))[0],
        "weights": lambda x: BN.apply(PARAMS, STATE, x, True, weights=weights)[0],
        "limits": lambda x: RENORM.apply(*renorm, x, True, limits=limits)[0],
        "update": lambda x: x + jaxbn.update_running(
            STATE, jaxbn.moments(x), momentum=make(0.5)).mean[None],
        "decay": lambda x: ema.update(average, X, decay=make(0.5)).average + x,
        "epsilon": lambda x: jaxbn.normalize(x, x[0], x[0] ** 2, epsilon=make(0.5)),
        "rate": lambda x: jaxbn.dropout(jax.random.key(0), x, make(0.5), True),
        "keep_prob": lambda x: tf1.dropout(jax.random.key(0), x, keep_prob=make(0.5)),
        "adjustment": lambda x: BN.apply(
            PARAMS, STATE, x, True, adjustment=(make([2.0, 1.0]), make([0.0, 1.0])))[0],
        "penalty": lambda x: x + jaxbn.optim.scale_penalty(
            PARAMS, l1=make(0.5), l2=make(1.0)),
        "field": lambda x: jaxbn.BatchNorm(momentum=make(0.5), epsilon=make(0.5)).apply(
            PARAMS, STATE, x, True)[0],
        "tf1": lambda x: old.apply({"beta": PARAMS.bias}, {
            "moving_mean": STATE.mean, "moving_variance": STATE.var}, x, True)[0],
        "tf1_epsilon": lambda x: tf1.nn_batch_normalization(
            x, x[:1], x[:1] ** 2, None, None, make(0.5)),
        "schedule": lambda x: x + jaxbn.renorm_limits(
            30_000, start=make(5_000), r_max=make(3.0)).r_max,
        "sync_state": lambda x: x + jax.vmap(
            lambda s: jaxbn.sync_state(s, "d", weight=make(2.0)), axis_name="d"
        )(jax.tree.map(lambda a: a[None], STATE)).mean,
    }  # fmt: skip


MESH = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
MODES = {
    "jit": jax.jit,
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x[None])[1][0],
    "grad": lambda f: lambda x: jax.vjp(f, x)[0],
    "vmap": lambda f: lambda x: jax.vmap(f)(x[None])[0],
    "shard_map": lambda f: jax.jit(
        jax.shard_map(f, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
    ),
}
# Made before any trace, as a schedule of optax or a checkpoint makes them.
ARRAYS = {n: jnp.array(n, jnp.float32) for n in (0.5, 1.0, 2.0, 3.0, 5_000)}
PAIRS = {n: jnp.array(n) for n in ((2.0, 1.0), (0.0, 1.0))}


def as_jax(value):
    return PAIRS[tuple(value)] if isinstance(value, list) else ARRAYS[value]


@pytest.mark.parametrize("make", [as_jax, np.float32], ids=["jax", "numpy"])
@pytest.mark.parametrize("use", concrete_uses(np.float32))
def test_a_concrete_array_may_stand_for_a_number_inside_every_transformation(use, make):
    function = concrete_uses(make)[use]
    plain = concrete_uses(lambda n: n if isinstance(n, float | int) else jnp.array(n))[use]
    right = plain(X)
    np.testing.assert_allclose(function(X), right, rtol=1e-6)
    for name, mode in MODES.items():
        if (use, name) == ("sync_state", "shard_map"):
            continue  # JAX has no psum over a vmap inside of it
        np.testing.assert_allclose(mode(function)(X), right, rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def without_checks(monkeypatch):
    def passes(*arguments, **options):
        return None

    with monkeypatch.context() as patch:
        patch.setattr(batch_norm, "check_momentum", passes)
        patch.setattr(batch_norm, "check_real", passes)
        patch.setattr(batch_renorm, "check_momentum", passes)
        patch.setattr(batch_renorm, "check_limits", passes)
        patch.setattr("jaxbn._layers.normalizer.refuse_half", passes)
        for name in ("check_made_by", "check_adjustment", "check_residual"):
            patch.setattr(f"jaxbn._layers.checks.{name}", passes)
        patch.setattr("jaxbn._statistics.weights.known", passes)
        patch.setattr("jaxbn._averages._check_decay", passes)
        patch.setattr("jaxbn._statistics.running.check_momentum", passes)
        yield


CHECKED = "momentum", "weights", "limits", "update", "decay", "adjustment"


@pytest.mark.parametrize("use", CHECKED)
def test_checks_stage_no_operation(use, monkeypatch):
    function = concrete_uses(as_jax)[use]
    checked = str(jax.make_jaxpr(function)(X))
    with without_checks(monkeypatch):
        bare = str(jax.make_jaxpr(function)(X))
    assert checked.count(" = ") == bare.count(" = ")


def test_weights_are_examined_inside_a_trace():
    weights = jnp.array([-1.0] + 7 * [1.0])
    with pytest.raises(ValueError, match=r"negative or NaN, got -1\.0"):
        jax.jit(lambda x: BN.apply(PARAMS, STATE, x, True, weights=weights))(X)
    with pytest.raises(ValueError, match=r"\[0, 1\], got"):
        jax.jit(lambda x: BN.apply(PARAMS, STATE, x, True, momentum=ARRAYS[2.0]))(X)


def test_a_traced_hyperparameter_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"momentum must be .*traced.*apply\("):
        jax.jit(lambda m: jaxbn.BatchNorm(momentum=m).init(2))(0.5)
