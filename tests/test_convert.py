"""Conversions: there and back bit for bit, on to other libraries, and what is refused.

That training goes on as in the source is, for most, in test_golden.py.
"""

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from jaxbn import convert
from tests.golden_runners.case import Case
from tests.golden_runners.convert import run_layer

F = np.float32
DECAY = 0.9
LIBRARIES = ("equinox", "flax", "haiku", "keras", "tf1", "torch")
PUBLIC = {f"{verb}_{name}" for verb in ("find", "from", "to") for name in LIBRARIES}
PUBLIC |= {"Checkpoint", "CheckpointError", "Converted", "EmaBatchNorm", "Found"}
PUBLIC |= {"load", "read", "save"}


def recorded(names, folder=Path(__file__).parent / "golden"):
    observed = json.loads((folder / "observed_error.json").read_text())["cases"]
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    return [Case(folder, case, observed) for case in cases if case["name"] in names]


def test_the_public_names_are_these_and_documented():
    public = {name for name, v in vars(convert).items() if not inspect.ismodule(v)}
    assert {name for name in public if not name.startswith("_")} == PUBLIC
    for name in PUBLIC:
        value = getattr(convert, name)
        assert ">>> " in inspect.getdoc(value), name
        if inspect.isfunction(value):
            for section in ("Args:", "Raises:"):
                assert section in inspect.getdoc(value), name
    for name in LIBRARIES:  # what one layer is told, a model is told too, by keyword
        read, find = (getattr(convert, f"{verb}_{name}") for verb in ("from", "find"))
        of = lambda function: inspect.signature(function).parameters
        options = [*of(read).values()][2:]
        assert options == [*of(find).values()][1:], name
        assert all(option.kind is option.KEYWORD_ONLY for option in options), name
        given = {"decay_rate": DECAY} if name == "haiku" else {}
        for unknown in ("prefix", "decay"):
            with pytest.raises(TypeError, match=unknown):
                find({}, **given, **{unknown: "bn"})


def torch_arrays(draw):
    count = np.int64(draw.steps)
    return {
        **draw.affine("net.bn.weight", "net.bn.bias"),
        "net.bn.running_mean": draw.mean(),
        "net.bn.running_var": draw.var(),
        **({"net.bn.num_batches_tracked": count} if draw.flag else {}),
    }


def keras_arrays(draw, suffix="", extra=()):
    arrays = {
        **draw.affine("net/bn/gamma", "net/bn/beta"),
        "net/bn/moving_mean": draw.mean(),
        "net/bn/moving_variance": draw.var(),
        **{f"net/bn/{name}": draw.var() for name in extra},
    }
    return {name + suffix: array for name, array in arrays.items()}


def renorm_arrays(draw):
    return keras_arrays(draw, extra=("moving_stddev", "renorm_mean", "renorm_stddev"))


def debiased_arrays(draw):
    biased = {"net/bn/moving_mean/biased": draw.mean()}
    return {**keras_arrays(draw), **biased, "net/bn/moving_mean/local_step": F(draw.steps)}


def averaged_arrays(draw):
    shadow = {"net/bn/gamma/ExponentialMovingAverage": draw.mean()}
    draw.flag = True
    arrays = keras_arrays(draw)
    return {n: a for n, a in {**arrays, **shadow}.items() if n != "net/bn/gamma"}


def several_axes(draw):
    return {n: a.reshape(1, 2, 1, -1) for n, a in keras_arrays(draw.even()).items()}


def haiku_arrays(draw):
    features = lambda a: a.reshape(1, 1, -1)
    params = draw.affine("scale", "offset")
    state = {}
    for name, array in (("mean", draw.mean()), ("var", draw.var())):
        array = features(array)
        share = 1 - np.power(F(DECAY), F(draw.steps)).astype(F)
        hidden = array * share.astype(array.dtype)
        state[f"bn/~/{name}_ema"] = {
            "average": (hidden / share.astype(array.dtype)) if draw.steps else array,
            "hidden": hidden,
            "counter": np.int32(draw.steps),
        }
    params = {name: features(array) for name, array in params.items()}
    return {"params": {"bn": params}, "state": state}


def equinox_arrays(draw):
    arrays = draw.affine("net.bn.weight", "net.bn.bias")
    arrays |= {"net.bn.hidden_mean": draw.mean(), "net.bn.hidden_var": draw.var() + 1}
    return {**arrays, "net.bn.counter": np.int32(draw.steps)}


def equinox_ema_arrays(draw):
    arrays = draw.affine("net.bn.weight", "net.bn.bias")
    arrays |= {"net.bn.running_mean": draw.mean(), "net.bn.running_var": draw.var()}
    if not draw.steps:
        arrays["net.bn.running_mean"][:] = np.nan
    return {**arrays, "net.bn.first_time": np.asarray(draw.steps == 0)}


def linen_arrays(draw):
    stats = {"mean": draw.mean(), "var": draw.var()}
    params = draw.affine("scale", "bias")
    return {"params": {"net": {"bn": params}}, "batch_stats": {"net": {"bn": stats}}}


def nnx_arrays(draw):
    bn = {**draw.affine("scale", "bias"), "mean": draw.mean(), "var": draw.var()}
    return {"net": {"bn": bn}}


class Draw:
    """Arrays of a layer, drawn from a seed, over many orders of magnitude."""

    def __init__(self, seed, size, dtype, steps, scale=True, bias=True, flag=True):
        self.rng = np.random.default_rng(seed)
        self.size, self.dtype, self.steps, self.flag = size, dtype, steps, flag
        self.used = scale, bias

    def even(self):
        self.size *= 2
        return self

    def mean(self):
        spread = self.rng.uniform(-4, 4, self.size)
        return (self.rng.normal(size=self.size) * 10**spread).astype(self.dtype)

    def var(self):
        return np.abs(self.mean())

    def affine(self, scale, bias):
        arrays = {scale: self.mean(), bias: self.mean()}
        return {
            name: array
            for (name, array), use in zip(arrays.items(), self.used, strict=True)
            if use
        }


def source(arrays, name, find, to, prefix="net/bn", **options):
    return pytest.param(arrays, find, to, prefix, options, id=name)


to_nnx = lambda layer, prefix: convert.to_flax(layer, prefix, nnx=True)
intended = {"variance": "intended", "momentum": DECAY}
to_intended = lambda layer, prefix: convert.to_equinox(layer, prefix, variance="intended")
SOURCES = [
    source(torch_arrays, "torch", convert.find_torch, convert.to_torch, "net.bn"),
    source(
        torch_arrays, "torch cumulative", convert.find_torch, convert.to_torch, "net.bn",
        momentum=None,
    ),
    source(keras_arrays, "keras", convert.find_keras, convert.to_keras),
    source(
        lambda draw: keras_arrays(draw, ":0"), "tf.keras", convert.find_keras,
        convert.to_keras, fused=True,
    ),
    source(renorm_arrays, "keras renorm", convert.find_keras, convert.to_keras),
    source(keras_arrays, "tf1", convert.find_tf1, convert.to_tf1),
    source(debiased_arrays, "tf1 debiased", convert.find_tf1, convert.to_tf1),
    source(
        averaged_arrays, "tf1 averages", convert.find_tf1, convert.to_tf1, averages=True
    ),
    source(several_axes, "tf1 axes", convert.find_tf1, convert.to_tf1, axis=[1, 3]),
    source(
        haiku_arrays, "haiku", convert.find_haiku, convert.to_haiku, "bn", decay_rate=DECAY
    ),
    source(
        equinox_arrays, "equinox", convert.find_equinox, convert.to_equinox, "net.bn",
        momentum=DECAY,
    ),
    source(
        equinox_arrays, "equinox intended", convert.find_equinox, to_intended, "net.bn",
        **intended,
    ),
    source(
        equinox_ema_arrays, "equinox ema", convert.find_equinox, convert.to_equinox,
        "net.bn",
    ),
    source(linen_arrays, "linen", convert.find_flax, convert.to_flax),
    source(nnx_arrays, "nnx", convert.find_flax, to_nnx),
]  # fmt: skip


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, array), other in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert array.dtype == other.dtype, path
        assert array.shape == other.shape, path
        assert array.tobytes() == other.tobytes(), path


@pytest.mark.parametrize(("arrays", "find", "to", "prefix", "options"), SOURCES)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 4),
    dtype=st.sampled_from([np.float32, np.float16, jnp.bfloat16]),
    steps=st.sampled_from([0, 1, 2, 7, 1000]),
    scale=st.booleans(),
    bias=st.booleans(),
)
def test_there_and_back_is_exact(
    arrays, find, to, prefix, options, seed, size, dtype, steps, scale, bias
):
    if to is to_intended:
        # The variance that was added must not be lost in rounding.
        dtype, steps = F, max(steps, 1)
    draw = Draw(seed, size, dtype, steps, scale, bias, flag=options != {} or seed % 2)
    model = arrays(draw)
    model = {**model, "other": {"kernel": np.ones((2, 3), F)}}
    found = find(model, **options)
    assert list(found.layers) == [prefix]
    assert found.left[0].startswith("other")
    assert_equal(found.put_back(found.layers), model)
    layer = found.layers[prefix]
    del model["other"]
    alone = {name: tree for name, tree in model.items() if jax.tree.leaves(tree)}
    assert_equal(without_empty(to(layer, prefix)), without_empty(alone))


def without_empty(tree):
    if not isinstance(tree, dict):
        return tree
    inner = {name: without_empty(value) for name, value in tree.items()}
    return {name: value for name, value in inner.items() if jax.tree.leaves(value)}


@pytest.mark.parametrize(("arrays", "find", "to", "prefix", "options"), SOURCES)
def test_what_changed_goes_back_and_comes_again(arrays, find, to, prefix, options):
    model = arrays(Draw(0, 4, F, 7))
    found = find(model, **options)
    layer = found.layers[prefix]
    params, state = jax.tree.map(
        lambda leaf: leaf * 0.5 + 0.25, (layer.params, layer.state)
    )
    if isinstance(state, jaxbn.BatchStats):
        state = state._replace(weight=layer.state.weight)
    changed = dataclasses.replace(layer, params=params, state=state)
    back = found.put_back({prefix: changed})
    assert jax.tree.map(np.shape, back) == jax.tree.map(np.shape, model)
    again = find(back, **options).layers[prefix]
    assert again.bn == layer.bn
    for got, want in zip(
        jax.tree.leaves((again.params, again.state)),
        jax.tree.leaves((params, state)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=2e-6)


def bare(layer):
    return convert.Converted(getattr(layer.bn, "bn", layer.bn), layer.params, layer.state)


TARGETS = {
    "torch": (convert.to_torch, convert.from_torch, {}),
    "keras": (lambda layer, name: convert.to_keras(layer, name, ndim=4),
              lambda arrays, name: convert.from_keras(arrays, name, axis=[-1]), {}),
    "haiku": (lambda layer, name: convert.to_haiku(layer, name, ndim=4),
              convert.from_haiku, {"decay_rate": DECAY}),
    "equinox": (convert.to_equinox, convert.from_equinox, {"momentum": DECAY}),
    "linen": (convert.to_flax, convert.from_flax, {}),
    "nnx": (to_nnx, convert.from_flax, {}),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("debias", [False, True])
def test_a_layer_of_our_own_is_the_same_everywhere(target, debias):
    to, read, options = TARGETS[target]
    bn = jaxbn.BatchNorm(momentum=DECAY, debias=debias, epsilon=1e-3)
    params, state = bn.init(3)
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (8, 3)), F)
    for _ in range(3):
        _, state = bn.apply(params, state, x, True)
    there = read(to(convert.Converted(bn, params, state), "bn"), "bn", **options)
    for got, want in ((there.params, params), (there.state[:2], state[:2])):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    if target in ("haiku", "equinox"):
        seen = 1 - DECAY**3 if debias else 1
        np.testing.assert_allclose(there.state.weight, seen, rtol=1e-6)


# Recorded layers of libraries whose own runners in test_golden.py do without conversion.
RECORDED = [
    *("linen_defaults", "linen_axis_tuple", "linen_bf16_input", "linen_no_bias_no_scale"),
    *("nnx_defaults", "nnx_axis1_random"),
    *("layers_r2_defaults", "layers_r4_last_fused_default", "layers_r4_fused_eps_tiny"),
    *("layers_r4_axis1_unfused", "layers_axes_1_2", "layers_no_center_no_scale"),
    "layers_renorm_clip_const",
]
FLAGS = {"center", "scale", "renorm", "use_scale", "use_bias"}


@pytest.mark.parametrize("case", recorded(RECORDED), ids=str)
def test_training_goes_on_as_recorded(case):
    given = {name: value for name, value in case.kwargs.items() if name not in FLAGS}
    names = {"scale": "scale", "bias": "bias"}
    if case.system == "tf1":
        given = {"fused": len(case.meta["shape"]) == 4, **given}
        names = {"scale": "gamma", "bias": "beta"}
        read, write = convert.from_tf1, convert.to_tf1
    elif case.system == "nnx":
        read, write = convert.from_flax, lambda layer: convert.to_flax(layer, nnx=True)
    else:
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        parts = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}
        tree = lambda arrays: {
            part: {name: arrays[name] for name in names if name in arrays}
            for part, names in parts.items()
        }
        read = lambda arrays, **given: convert.from_flax(tree(arrays), **given)
        write = lambda layer: {
            name: array
            for arrays in convert.to_flax(layer).values()
            for name, array in arrays.items()
        }
    run_layer(case, functools.partial(read, **given), write, names)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_training_goes_on_as_in_flax(spread):
    model = nn.BatchNorm(momentum=0.8, use_running_average=False, use_fast_variance=False)
    rng = np.random.default_rng(1)
    xs = [jnp.asarray(rng.normal(2, spread, (6, 2, 4)), F) for _ in range(4)]
    variables = model.init(jax.random.key(0), xs[0])
    _, updates = model.apply(variables, xs[0], mutable=["batch_stats"])
    variables = {**variables, **updates}
    found = convert.find_flax(variables, momentum=0.8)
    (layer,) = found.layers.values()
    state = layer.state
    for x in xs[1:]:
        want, updates = model.apply(variables, x, mutable=["batch_stats"])
        got, state = layer.bn.apply(layer.params, state, x, True)
        variables = {**variables, **updates}
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    back = found.put_back({"": dataclasses.replace(layer, state=state)})
    for name, array in variables["batch_stats"].items():
        np.testing.assert_allclose(back["batch_stats"][name], array, rtol=1e-6)


@pytest.mark.parametrize("momentum", [1.0, jnp.float32(1)])
def test_the_first_batch_starts_an_ema_norm_whatever_the_momentum(momentum):
    layer = convert.EmaBatchNorm()
    params, state = layer.init(2)
    x = np.random.default_rng(0).normal(3, 2, (8, 2))
    for batch in (x, 5 * x):
        y, state = layer.apply(
            params, state, jnp.asarray(batch, F), True, momentum=momentum
        )
        want = (batch - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.mean, x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(state.var, x.var(0), rtol=1e-6)
    np.testing.assert_array_equal(state.weight, 1)


def test_an_ema_norm_over_devices_and_with_a_traced_mode():
    layer = convert.EmaBatchNorm(jaxbn.BatchNorm(momentum=0.8, axis_name="d"))
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (2, 4, 3))
    params, state = layer.init(3)
    mean, var = np.zeros(3), np.ones(3)

    @functools.partial(jax.vmap, in_axes=(None, 0, None), axis_name="d")
    def step(state, x, training):
        return layer.apply(params, state, x, training)

    for training in (True, True, False):
        y, states = jax.jit(step)(state, jnp.asarray(x, F), jnp.asarray(training))
        state = jax.tree.map(lambda leaf: leaf[0], states)
        if training:
            keep = 0.0 if not mean.any() else 0.8
            mean = keep * mean + (1 - keep) * x.mean((0, 1))
            var = keep * var + (1 - keep) * x.var((0, 1))
        want = (x - mean) / np.sqrt(var + 1e-5)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.var, var, rtol=1e-5)
        x = rng.normal(-1, 4, (2, 4, 3))
    none = jnp.zeros((2, 4))
    y, states = jax.vmap(
        lambda x, w: layer.apply(params, state, x, True, weights=w), axis_name="d"
    )(jnp.asarray(x, F), none)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(states.var[0], state.var)


STATE_DICT = {
    "stem.weight": np.ones((4, 3, 3, 3), F),
    "bn1.weight": np.ones(4, F),
    "bn1.bias": np.zeros(4, F),
    "bn1.running_mean": np.zeros(4, F),
    "bn1.running_var": np.arange(4, dtype=F),
    "blocks.0.norm.weight": np.ones(4, F),  # a layer norm
    "blocks.0.norm.bias": np.zeros(4, F),
    "blocks.0.bn.running_mean": np.zeros(2, np.float16),
    "blocks.0.bn.running_var": np.ones(2, np.float16),
    "blocks.0.bn.num_batches_tracked": np.int64(12),
}


def test_a_model_is_reported_as_a_table():
    found = convert.find_torch(STATE_DICT, eps=1e-3, momentum=0.01)
    assert list(found.layers) == ["bn1", "blocks.0.bn"]
    assert found.left == ("stem.weight", "blocks.0.norm.weight", "blocks.0.norm.bias")
    bn = found.layers["blocks.0.bn"].bn
    assert (bn.momentum, bn.epsilon, bn.ddof, bn.use_scale) == (0.99, 1e-3, 1, False)
    table = str(found)
    for line in (
        r"^bn1 +4 +float32 +weight bias running_mean running_var +running_var is 0 in 1 ",
        r"^blocks.0.bn +2 +float32 +running_mean running_var num_batches_tracked +"
        r"running_mean widened from float16 to float32; running_var widened from float16 ",
        r"^stem.weight +4x3x3x3 +float32$",
        r"^blocks.0.bn: has statistics alone, the others params too: was it made without",
        r"^batch norms: 2, of 7 arrays; left: 3; suspicious: 1$",
    ):
        assert re.search(line, table, re.MULTILINE), table


def test_what_may_have_been_missed_is_listed_with_a_question():
    other = {
        "head.bn.weight": np.ones(4, F),
        "head.bn.bias": np.zeros(4, F),
        "head.layer_norm.weight": np.ones(4, F),
        "old.running_average": np.ones(4, F),
        "ema.bn1_mean_ema": np.ones(4, F),
    }
    found = convert.find_torch(STATE_DICT | other)
    assert found.suspicious.keys() == {
        "blocks.0.bn",
        "head.bn.weight",
        "head.bn.bias",
        "old.running_average",
        "ema.bn1_mean_ema",
    }
    assert "which norm is it of?" in found.suspicious["old.running_average"]
    assert "without statistics" in found.suspicious["head.bn.bias"]
    *_, list_of_five, last = str(found).split("suspicious")
    assert "blocks.0.bn: has statistics alone" in list_of_five
    assert last == ": 5"
    assert not convert.find_torch({"a." + k: a for k, a in BN.items()}).suspicious


def test_what_the_source_would_have_changed_is_noted():
    bn = {"moving_mean": np.zeros(3, F), "moving_variance": np.ones(3, F)}
    note = lambda layer: " ".join(layer.notes)
    assert convert.from_tf1(bn, epsilon=1e-7).bn.epsilon == 1.001e-5
    assert "1e-07" in note(convert.from_tf1(bn, epsilon=1e-7))
    assert convert.from_tf1(bn, epsilon=1e-7, fused=False).bn.epsilon == 1e-7
    assert convert.from_keras(bn, epsilon=1e-7).bn.epsilon == 1e-7
    debiased = {**bn, "moving_mean/biased": np.zeros(3, F)}
    debiased["moving_mean/local_step"] = F(4)
    assert "4 steps" in note(convert.from_tf1(debiased))
    stacked = {name: np.ones((2, 3), F) for name in ("mean", "var")}
    assert "stacked" in note(convert.from_flax(stacked))


def test_tensors_are_taken_as_they_are():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).half()
    found = convert.find_torch(module.state_dict())
    arrays = convert.to_torch(found.layers["1"], "1")
    module.load_state_dict({n: torch.as_tensor(a) for n, a in arrays.items()}, strict=False)
    assert found.left == ("0.weight", "0.bias")
    bf16 = convert.find_torch(module.to(torch.bfloat16).state_dict()).layers["1"]
    assert convert.to_torch(bf16)["running_var"].dtype == jnp.bfloat16


BN = {name: STATE_DICT[f"bn1.{name}"] for name in ("running_mean", "running_var")}
KERAS = {"moving_mean": np.zeros(3, F), "moving_variance": np.ones(3, F)}
EQUINOX = {"hidden_mean": np.zeros(3, F), "hidden_var": np.ones(3, F), "counter": F(1)}
HAIKU = haiku_arrays(Draw(0, 3, F, 2))
OWN = convert.Converted(jaxbn.BatchNorm(), *jaxbn.BatchNorm().init(3))
RENORM = convert.Converted(jaxbn.BatchRenorm(), *jaxbn.BatchRenorm().init(3))


def with_(arrays, **changes):
    return {name: a for name, a in {**arrays, **changes}.items() if a is not None}


def haiku(module, leaf, value, **options):
    state = {**HAIKU["state"], module: {**HAIKU["state"][module], leaf: value}}
    return convert.from_haiku({**HAIKU, "state": state}, "bn", decay_rate=DECAY, **options)


def put_back(name, **changes):
    found = convert.find_torch(STATE_DICT)
    return found.put_back({name: dataclasses.replace(found.layers["bn1"], **changes)})


# A module of Haiku as people make and train it: its settings, its x, the dtypes that it is
# trained and saved in, its decay, its batches, and the feature axes that it has here.
B, H = jnp.bfloat16, jnp.float16
TRAINED = {
    "channels first": ({"data_format": "NCHW"}, (4, 3, 2, 2), F, F, 0.9, 3, 1),
    "channels last": ({"data_format": "NHWC"}, (4, 2, 2, 3), F, F, 0.9, 3, -1),
    "sequences": ({"data_format": "BTD"}, (4, 2, 3), F, F, 0.9, 3, -1),
    "negative axes": ({"axis": (0, -1, -2)}, (4, 3, 2, 2), F, F, 0.9, 3, (1,)),
    "slow outside jit": ({}, (4, 3), F, F, 0.999, 30, -1),
    "trained in bfloat16": ({}, (4, 3), B, B, 0.99, 10, -1),
    "trained in float16": ({"data_format": "NC..."}, (4, 3, 2), H, H, 0.999, 10, 1),
    "saved in bfloat16": ({}, (4, 3), F, B, 0.99, 10, -1),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_module_of_haiku_goes_on_as_it_was_trained(name):
    options, shape, dtype, saved, decay, steps, axes = TRAINED[name]
    weighted = name != "negative axes"

    def run(x, training):
        return hk.BatchNorm(weighted, weighted, decay, name="bn", **options)(x, training)

    model = hk.transform_with_state(run)
    rng = np.random.default_rng(0)
    # A mean of 100 shows a hidden average that is read with the wrong share of it.
    batches = jnp.asarray(rng.normal(100, 20, (steps + 1, *shape)), dtype)
    params, state = model.init(None, batches[0], True)
    # Eager, since JAX raises decay to the count with more rounding there than under jit.
    for x in batches[:-1]:
        _, state = model.apply(params, state, None, x, True)
    trees = jax.tree.map(
        lambda a: a.astype(saved) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        {"params": params, "state": state},
    )
    found = convert.find_haiku(trees, decay_rate=decay, **options)
    layer = found.layers["bn"]
    assert layer.bn.feature_axes == axes
    assert {leaf.dtype for leaf in jax.tree.leaves(layer.state)} == {np.dtype(F)}
    half = jnp.dtype(saved).itemsize == 2
    widened = f"~/mean_ema/average widened from {jnp.dtype(saved)} to float32"
    assert (widened in layer.notes) == half
    rtol = 2 * float(jnp.finfo(saved).eps) if half else 1e-5
    hidden, average = (trees["state"]["bn/~/mean_ema"][n] for n in ("hidden", "average"))
    np.testing.assert_allclose(
        layer.state.mean * layer.state.weight, hidden.ravel(), rtol=3 * rtol
    )
    x = batches[-1].astype(F)
    wide = jax.tree.map(lambda a: a.astype(F), (trees["params"], trees["state"]))
    want, _ = model.apply(*wide, None, x, False)
    params = jax.tree.map(lambda a: a.astype(F), layer.params)
    got, _ = layer.bn.apply(params, layer.state, x, False)
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert_equal(found.put_back(found.layers), jax.tree.map(np.asarray, trees))
    # A mean that is changed goes back with the counter and the share that it came with.
    doubled = layer.state._replace(mean=layer.state.mean * 2)
    back = found.put_back({"bn": dataclasses.replace(layer, state=doubled)})
    ema = back["state"]["bn/~/mean_ema"]
    assert ema["counter"] == steps
    np.testing.assert_allclose(ema["average"], 2 * average)
    np.testing.assert_allclose(ema["hidden"].astype(F), 2 * hidden.astype(F), rtol=3 * rtol)


# What a checkpoint or a caller may get wrong: the call, the fact, and the remedy.
MISTAKES = {
    "no such layer": (
        lambda: convert.from_torch(STATE_DICT, "bn2"), "'bn2'.*'blocks.0.bn'", "2 others",
    ),
    "a layer norm": (
        lambda: convert.from_torch(STATE_DICT, "blocks.0.norm"), "running_mean", "others",
    ),
    "no variance": (
        lambda: convert.from_torch(with_(BN, running_var=None)), "running_var",
        "checkpoint",
    ),
    "no variance in a model": (
        lambda: convert.find_torch(with_(STATE_DICT, **{"bn1.running_var": None})),
        "1 of 2.*bn1.running_var", "checkpoint",
    ),
    "no count": (
        lambda: convert.from_torch(BN, momentum=None), "num_batches_tracked", "checkpoint",
    ),
    "negative variance": (
        lambda: convert.from_torch(with_(BN, running_var=np.array([1, 2, -1, 3], F))),
        "running_var is negative in 1 of 4 channels, the first being 2", "anew",
    ),
    "nan": (
        lambda: convert.from_torch(with_(BN, running_mean=np.full(4, np.nan, F))),
        "running_mean is not finite in 4 of 4", "earlier",
    ),
    "infinite scale": (
        lambda: convert.from_torch(with_(BN, weight=np.array([1, np.inf, 1, 1], F))),
        "weight is not finite", "earlier",
    ),
    "shapes": (
        lambda: convert.from_torch(with_(BN, bias=np.ones(5, F))), r"\(5,\).*\(4,\)",
        "layer",
    ),
    "a number": (
        lambda: convert.from_torch({n: F(1) for n in BN}), "single number", "axis",
    ),
    "integers": (
        lambda: convert.from_torch(with_(BN, weight=np.ones(4, np.int8))), "int8",
        "Quantized",
    ),
    "float64": (
        lambda: convert.from_torch(with_(BN, weight=np.ones(4))), "float64", "enable_x64",
    ),
    "names twice": (
        lambda: convert.find_flax({"a": {"b": F(1)}, "a/b": F(1)}), "'a/b'", "Rename",
    ),
    "a list": (lambda: convert.find_torch([F(1)]), "list", "convert.load"),
    "a text": (
        lambda: convert.from_torch(with_(BN, weight="1")),
        "weight must be an array, got str", "dicts",
    ),
    "momentum": (lambda: convert.from_torch(BN, momentum=1.5), "1.5", "new batch"),
    "axes": (
        lambda: convert.from_tf1(
            {n: a.reshape(1, 3) for n, a in KERAS.items()}, axis=[0, 2]
        ),
        r"\(1, 3\).*axes \(0, 2\)", "made with",
    ),
    "two axes for one": (
        lambda: convert.from_keras({n: np.ones((2, 3), F) for n in KERAS}), r"\(2, 3\)",
        "made with",
    ),
    "half a renorm": (
        lambda: convert.from_keras({**KERAS, "renorm_mean": np.ones(3, F)}),
        "moving_stddev", "checkpoint",
    ),
    "an old renorm": (
        lambda: convert.from_tf1({**KERAS, "renorm_mean_weight": F(1)}), "before 1.15",
        "Divide",
    ),
    "clipping": (
        lambda: convert.from_keras(
            {**KERAS, **{n: np.ones(3, F) for n in ("moving_stddev", "renorm_mean",
             "renorm_stddev")}}, renorm_clipping={"r_max": 3}), "r_max", "made with",
    ),
    "decay": (
        lambda: convert.from_haiku(HAIKU, "bn", decay_rate=0.99), "hidden.*0.99 and 2",
        "decay_rate",
    ),
    "counters": (
        lambda: haiku("bn/~/var_ema", "counter", np.int32(3)), "counter is 2.*is 3", "Both",
    ),
    "negative counter": (
        lambda: haiku("bn/~/mean_ema", "counter", np.int32(-1)), "mean_ema/counter.*-1",
        "it is",
    ),
    "infinite counter": (
        lambda: convert.from_equinox(with_(EQUINOX, counter=F(np.inf))), "counter.*inf",
        "it is",
    ),
    "several counters": (
        lambda: convert.from_equinox(with_(EQUINOX, counter=np.ones(2, int))), "counter",
        "it is",
    ),
    "data format": (
        lambda: convert.from_haiku(HAIKU, "bn", decay_rate=0.9, data_format="CHWN"), "CHWN",
        "made with",
    ),
    "other channels": (
        lambda: convert.from_haiku(HAIKU, "bn", decay_rate=0.9, data_format="NC..."),
        r"\(1, 1, 3\).*1 everywhere", "made with",
    ),
    "negative axes of weights": (
        lambda: convert.from_haiku(
            with_(HAIKU, params={"bn": {"scale": np.ones((1, 2, 3))}}), "bn",
            decay_rate=0.9, axis=(0, -2)), r"\(1, 2, 3\).*\(1, 1, 3\).*\(0, -2\)",
        "without scale and offset",
    ),
    "rank of x": (lambda: convert.to_haiku(OWN, "bn"), "rank of x", "ndim=4"),
    "hidden variance": (
        lambda: convert.from_equinox(
            with_(EQUINOX, hidden_var=np.full(3, 0.5, F)), variance="intended"),
        "hidden_var is below.*0.99", "momentum",
    ),
    "variance": (
        lambda: convert.from_equinox(EQUINOX, variance="true"), "'true'", '"used"',
    ),
    "no decay": (
        lambda: convert.to_equinox(convert.Converted(
            jaxbn.BatchNorm(momentum=None), OWN.params, OWN.state)),
        "momentum=None", "decay",
    ),
    "renorm elsewhere": (
        lambda: convert.to_torch(RENORM), "BatchRenorm", "BatchNorm in it",
    ),
    "ema of what": (
        lambda: convert.EmaBatchNorm(jaxbn.BatchRenorm()), "BatchRenorm", "settings",
    ),
    "ema debias": (
        lambda: convert.EmaBatchNorm(jaxbn.BatchNorm(debias=True)), "debias=True",
        "Leave out",
    ),
    "put back elsewhere": (lambda: put_back("bn3"), "'bn3'.*'bn1'", "There were 2"),
    "put back without bias": (
        lambda: put_back("bn1", params=jaxbn.BatchNormParams(jnp.ones(4), None)),
        "'bn1' has the arrays.*bn1.bias.*would get", "values",
    ),
    "put back of other features": (
        lambda: put_back("bn1", params=OWN.params, state=OWN.state),
        r"\(4,\).*\(3,\)", "new",
    ),
    "overflow": (
        lambda: convert.to_torch(dataclasses.replace(
            convert.from_torch(STATE_DICT, "blocks.0.bn"),
            state=jaxbn.BatchStats(jnp.full(2, 1e6), jnp.ones(2)))), "float16", "anew",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_fact_and_a_remedy(mistake):
    call, fact, remedy = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert re.search(fact, message, re.DOTALL), message
    assert re.search(remedy, message), message
    assert message.endswith("."), message
