"""Every wrong argument gets one sentence of fact and one of remedy, before any work."""

import copy
import dataclasses
import functools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.equinox
import jaxbn.haiku

BN = jaxbn.BatchNorm()
PARAMS, STATE = BN.init(3)
X = jnp.ones((4, 3))
RENORM = jaxbn.BatchRenorm()


def apply(x=X, training=True, params=PARAMS, state=STATE, bn=BN, **options):
    return bn.apply(params, state, x, training, **options)


def equinox(x=X, *args, state=None, cls=jaxbn.equinox.BatchNorm, call=(), **kwargs):
    """Calls a layer of Equinox once, by default with its own state."""
    layer, own = eqx.nn.make_with_state(cls)(*(args or (3,)), **kwargs)
    return layer(x, own if state is None else state, **dict(call))


def haiku(x=X, mode=True, state=None, call=(), seen=X, cls=jaxbn.haiku.BatchNorm, **kwargs):
    """Calls a layer of Haiku once, by default with its own params and state."""
    if cls is jaxbn.haiku.BatchNorm:
        kwargs = {"create_scale": True, "create_offset": False, "decay_rate": 0.9, **kwargs}
    model = hk.transform_with_state(lambda x, mode, **call: cls(**kwargs)(x, mode, **call))
    params, own = model.init(None, seen, True)
    return model.apply(params, own if state is None else state, None, x, mode, **dict(call))


EQUINOX = eqx.nn.make_with_state(jaxbn.equinox.BatchNorm)
ENSEMBLE = eqx.filter_vmap(lambda _: EQUINOX(3))(X[:, 0])[1]
STATE_OF_HAIKU = {
    f"batch_norm/~/{name}": {
        "average": X[:1],
        "hidden": X[:1],
        "counter": jnp.ones((), int),
    }
    for name in ("mean_ema", "var_ema")
}


# What a user may get wrong: the call, the error, what it says is wrong, and the remedy.
MISTAKES = {
    "feature_count": (lambda: apply(jnp.ones((4, 5))), ValueError, r"\(3,\)", "init"),
    "rank_1": (lambda: apply(jnp.ones(3)), ValueError, r"\(3,\)", r"x\[None\]"),
    "rank_0": (lambda: apply(jnp.ones(())), ValueError, "rank 0", "feature_axes"),
    "integer_x": (lambda: apply(jnp.ones((4, 3), int)), TypeError, "int32", "astype"),
    "complex_x": (
        lambda: apply(jnp.ones((4, 3), jnp.complex64)), TypeError, "complex64", "param_dtype",
    ),
    "axis_out_of_range": (
        lambda: apply(bn=jaxbn.BatchNorm(feature_axes=2)), ValueError, "axis 2", "within",
    ),
    "axis_twice": (
        lambda: apply(bn=jaxbn.BatchNorm(feature_axes=(1, -1))), ValueError, "twice", "once",
    ),
    "axis_float": (lambda: jaxbn.BatchNorm(feature_axes=1.0), TypeError, "1.0", "channels"),
    "axis_text": (lambda: jaxbn.BatchNorm(feature_axes="C"), TypeError, "'C'", "channels"),
    "momentum_above": (lambda: jaxbn.BatchNorm(momentum=1.5), ValueError, "1.5", "PyTorch"),
    "momentum_below": (lambda: jaxbn.BatchNorm(momentum=-0.1), ValueError, "-0.1", "PyTorch"),
    "momentum_nan": (lambda: jaxbn.BatchNorm(momentum=np.nan), ValueError, "nan", "PyTorch"),
    "momentum_text": (lambda: jaxbn.BatchNorm(momentum="0.9"), TypeError, "'0.9'", "number"),
    "momentum_array": (
        lambda: jaxbn.BatchNorm(momentum=jnp.array([0.9])), TypeError, "array", r"apply\(",
    ),
    "momentum_override": (lambda: apply(momentum=2.0), ValueError, "2.0", "PyTorch"),
    "momentum_vector": (lambda: apply(momentum=jnp.ones(3)), TypeError, "scalar", "schedule"),
    "epsilon_zero": (lambda: jaxbn.BatchNorm(epsilon=0.0), ValueError, "got 0.0", "1e-5"),
    "epsilon_negative": (lambda: jaxbn.BatchNorm(epsilon=-1e-5), ValueError, "-1e-05", "1e-5"),
    "epsilon_nan": (lambda: jaxbn.BatchNorm(epsilon=np.nan), ValueError, "nan", "1e-5"),
    "ddof_negative": (lambda: jaxbn.BatchNorm(ddof=-1), ValueError, "-1", "0 or 1"),
    "ddof_float": (lambda: jaxbn.BatchNorm(ddof=0.5), TypeError, "0.5", "PyTorch"),
    "dtype_int": (lambda: jaxbn.BatchNorm(dtype=int), TypeError, "int", "float32"),
    "debias_cumulative": (
        lambda: jaxbn.BatchNorm(momentum=None, debias=True), ValueError, "momentum=None", "Drop",
    ),
    "weights_shape": (
        lambda: apply(weights=jnp.ones(5)), ValueError, r"\(5,\).*\(4, 3\)", "broadcasts",
    ),
    "weights_rank": (
        lambda: apply(weights=jnp.ones((4, 3, 1))), ValueError, r"\(4, 3, 1\)", "broadcasts",
    ),
    "weights_negative": (
        lambda: apply(weights=jnp.array([1.0, -2.0, 1, 1])), ValueError, "-2.0", "weight 0",
    ),
    "weights_nan": (
        lambda: apply(weights=jnp.array([1.0, np.nan, 1, 1])), ValueError, "nan", "weight 0",
    ),
    "weights_complex": (
        lambda: apply(weights=jnp.ones(4, jnp.complex64)), TypeError, "complex64", "magnitude",
    ),
    "params_of_another": (
        lambda: apply(bn=jaxbn.BatchNorm(use_bias=False)), ValueError, "params.bias", "init",
    ),
    "params_missing": (
        lambda: apply(params=PARAMS._replace(scale=None)), ValueError, "params.scale", "init",
    ),
    "params_dict": (
        lambda: apply(params={"scale": X[0]}), TypeError, "dict", "BatchNormParams",
    ),
    "params_and_state_swapped": (
        lambda: apply(params=STATE, state=PARAMS), TypeError, "BatchStats", "init",
    ),
    "state_of_another": (
        lambda: apply(bn=jaxbn.BatchNorm(debias=True)), ValueError, "state.weight", "init",
    ),
    "training_vector": (lambda: apply(training=jnp.ones(1, bool)), TypeError, r"\(1,\)", "False"),
    "training_int": (lambda: apply(training=1), TypeError, "got 1", "False"),
    "training_float": (lambda: apply(training=jnp.ones(())), TypeError, "float32", "False"),
    "training_none": (lambda: apply(training=None), TypeError, "None", "False"),
    "features_float": (lambda: BN.init(3.0), TypeError, "3.0", r"x.shape\[-1\]"),
    "features_shape": (lambda: BN.init((4, 3)), ValueError, r"\(4, 3\)", "one for each"),
    "features_negative": (lambda: BN.init(-3), ValueError, "-3", "non-negative"),
    "initializer_needs_key": (
        lambda: BN.init(3, scale_init=jax.nn.initializers.normal()), TypeError, "key", "key=",
    ),
    "initializer_shape": (
        lambda: BN.init(3, scale_init=lambda *_: jnp.ones(2)), ValueError, r"\(2,\)", "shape",
    ),
    "normalize_shape": (
        lambda: jaxbn.normalize(X, X[0], X[0, :2]), ValueError, r"var.*\(2,\)", "feature_axes",
    ),
    "normalize_epsilon": (
        lambda: jaxbn.normalize(X, X[0], X[0], epsilon=0), ValueError, "got 0", "1e-5",
    ),
    "merge_shapes": (
        lambda: jaxbn.merge_moments(jaxbn.moments(X), jaxbn.moments(X[:, :2])),
        ValueError, r"\(3,\).*\(2,\)", "same features",
    ),
    "update_shapes": (
        lambda: jaxbn.update_running(STATE, jaxbn.moments(X[:, :2])),
        ValueError, r"\(3,\).*\(2,\)", "belongs",
    ),
    "update_cumulative": (
        lambda: jaxbn.update_running(STATE, jaxbn.moments(X), momentum=None),
        ValueError, "weight", "momentum=None",
    ),
    "activation_text": (
        lambda: jaxbn.BatchNorm(activation="relu"), TypeError, "'relu'", "jax.nn.relu",
    ),
    "residual_shape": (lambda: apply(residual=X[:2]), ValueError, r"\(2, 3\)", "broadcast_to"),
    "adjustment_single": (lambda: apply(adjustment=X[0]), TypeError, "pair", "two arrays"),
    "adjustment_shape": (
        lambda: apply(adjustment=(X[:2], X[:2])), ValueError, r"\(2, 3\)", "one of these",
    ),
    "renorm_r_max": (
        lambda: jaxbn.BatchRenorm(limits=jaxbn.RenormLimits(r_max=0.5)), ValueError,
        "r_max.*0.5", "factor r of 1",
    ),
    "renorm_r_min": (
        lambda: jaxbn.BatchRenorm(limits=jaxbn.RenormLimits(r_min=2.0)), ValueError,
        "r_min.*2.0", "factor r of 1",
    ),
    "renorm_d_max": (
        lambda: RENORM.apply(*RENORM.init(3), X, True, limits=jaxbn.RenormLimits(d_max=-1.0)),
        ValueError, "d_max.*-1.0", "offset d of 0",
    ),
    "renorm_limits_dict": (
        lambda: RENORM.apply(*RENORM.init(3), X, True, limits={"rmax": 2}), TypeError,
        "dict", r"RenormLimits\(",
    ),
    "renorm_traced_limit": (
        lambda: jaxbn.BatchRenorm(limits=jaxbn.RenormLimits(r_max=jnp.ones(3))), TypeError,
        "r_max.*array", "number",
    ),
    "renorm_schedule": (
        lambda: jaxbn.renorm_limits(0, start=10, r_steps=5), ValueError, "start=10", "durations",
    ),
    "renorm_of_ghosts": (
        lambda: jaxbn.BatchRenorm(jaxbn.GhostBatchNorm(BN, 2)), TypeError,
        "GhostBatchNorm", r"GhostBatchNorm\(BatchRenorm",
    ),
    "renorm_debias": (
        lambda: jaxbn.BatchRenorm(jaxbn.BatchNorm(ddof=1)), ValueError, "ddof=1", "Leave out",
    ),
    "renorm_momentum": (lambda: jaxbn.BatchRenorm(momentum=None), TypeError, "None", "0.99"),
    "renorm_complex": (
        lambda: RENORM.apply(*RENORM.init(3), jnp.ones((4, 3), jnp.complex64), True), TypeError,
        "complex64", "two features",
    ),
    "renorm_state_of_plain": (
        lambda: RENORM.apply(PARAMS, STATE, X, True), TypeError, "RenormStats", r"init\(\)",
    ),
    "ghost_of_ghosts": (
        lambda: jaxbn.GhostBatchNorm(jaxbn.GhostBatchNorm(BN, 2), 2), TypeError,
        "GhostBatchNorm", "smaller size",
    ),
    "ghost_size_zero": (lambda: jaxbn.GhostBatchNorm(BN, 0), ValueError, "got 0", "Use"),
    "ghost_size_float": (lambda: jaxbn.GhostBatchNorm(BN, 2.0), TypeError, "2.0", "Use"),
    "ghost_layout": (
        lambda: jaxbn.GhostBatchNorm(BN, 2, layout="random"), ValueError, "random", "strided",
    ),
    "ghost_not_dividing": (
        lambda: jaxbn.GhostBatchNorm(BN, 3).apply(PARAMS, STATE, X, True), ValueError,
        "virtual_batch_size=3.*4 rows", "Drop the last 1",
    ),
    "ghost_rows_are_features": (
        lambda: jaxbn.GhostBatchNorm(jaxbn.BatchNorm(feature_axes=0), 2).apply(
            *BN.init(4), X, True
        ), ValueError, r"axis 0.*\(1,\)", "Leave axis 0",
    ),
    "channels_first": (
        lambda: apply(jnp.ones((4, 3, 5, 5))), ValueError, r"\(3,\)", "feature_axes=1,",
    ),
    "dtype_short": (lambda: jaxbn.BatchNorm(dtype="bf16"), TypeError, "'bf16'", r"jnp\.bfloat16"),
    "dtype_of_torch": (
        lambda: jaxbn.BatchNorm(param_dtype="torch.half"), TypeError, "torch.half", r"jnp\.float16",
    ),
    "misspelt_option_of_ghosts": (
        lambda: jaxbn.GhostBatchNorm(BN, 2).apply(PARAMS, STATE, X, False, momentun=0.5),
        TypeError, "momentun", "momentum=0.5",
    ),
    "misspelt_field": (lambda: jaxbn.BatchNorm(momentun=0.9), TypeError, "momentun", "momentum=0.9"),
    "misspelt_option": (lambda: apply(weigths=None), TypeError, "weigths", "weights=None"),
    "misspelt_option_of_function": (
        lambda: jaxbn.apply(PARAMS, STATE, X, True, BN, weigths=None), TypeError, "weigths", "weights",
    ),
    "misspelt_init": (lambda: jaxbn.init(3, scale=jnp.ones), TypeError, "scale", "use_scale"),
    "a_call": (lambda: BN(X), TypeError, "no function", r"bn\.apply\("),
    "a_call_of_a_wrapper": (
        lambda: jaxbn.GhostBatchNorm(BN, 2)(PARAMS, STATE, X), TypeError, "GhostBatchNorm", r"bn\.apply\(",
    ),
    "size_first": (lambda: jaxbn.BatchNorm(64), TypeError, "got 1 by position: 64", r"init\(64\)"),
    "size_and_axis_name": (lambda: jaxbn.BatchNorm(64, "batch"), TypeError, "64, 'batch'", r"init\(64\)"),
    "size_of_renorm": (lambda: jaxbn.BatchRenorm(64), TypeError, "64", r"BatchRenorm\(jaxbn\.BatchNorm\(\)"),
    "size_of_ghosts": (lambda: jaxbn.GhostBatchNorm(64, 8), TypeError, "64", r"GhostBatchNorm\(jaxbn"),
    "size_of_gather": (lambda: jaxbn.Gather(64), TypeError, "64", r"Gather\(jaxbn"),
    "too_many": (
        lambda: BN.apply(PARAMS, STATE, X, True, X), TypeError, "got 5 by position", "by name: weights",
    ),
    "too_many_for_ghosts": (
        lambda: jaxbn.GhostBatchNorm(BN, 2).apply(PARAMS, STATE, X, True, X), TypeError,
        "got 5 by position", "by name: weights",
    ),
    "no_mode": (lambda: BN.apply(PARAMS, STATE, X), TypeError, "training, got none", "training=True"),
    "no_size": (lambda: BN.init(), TypeError, "num_features, got none", r"x\.shape\[-1\]"),
    "equinox_channels_last": (
        lambda: equinox(jnp.ones((5, 5, 3)), 3, "batch"), ValueError,
        r"5 channels on axis 0.*input_size=3", "channels come first.*feature_axes=2",
    ),
    "equinox_batch_to_a_mapped_layer": (
        lambda: equinox(X, 3, "batch"), ValueError, "4 channels on axis 0", r"under jax\.vmap",
    ),
    "equinox_example_to_a_layer_of_batches": (
        lambda: equinox(X[0]), ValueError, r"\(3,\) has no axis 1", "a layer with axis_name",
    ),
    "equinox_feature_count": (
        lambda: equinox(jnp.ones((4, 5))), ValueError, "5 channels.*input_size=3", "there is no 3",
    ),
    "equinox_no_vmap": (lambda: equinox(X[0], 3, "b"), NameError, "no mapped axis 'b'", r"jax\.vmap with axis_name"),
    "equinox_state_of_another_mode": (
        lambda: equinox(state=EQUINOX(3, mode="ema")[1]), ValueError, "no statistics", "make_with_state",
    ),
    "equinox_state_of_another_size": (
        lambda: equinox(state=EQUINOX(5)[1]), ValueError, r"shape \(5,\).*3 channels", "together with the model",
    ),
    "equinox_state_of_an_ensemble": (lambda: equinox(state=ENSEMBLE), ValueError, r"shape \(4, 3\)", "filter_vmap"),
    "equinox_no_state": (lambda: equinox(state=STATE), TypeError, "BatchStats", "make_with_state"),
    "equinox_mode": (lambda: equinox(X, 3, mode="train"), ValueError, "'train'", '"batch"'),
    "equinox_inference": (lambda: equinox(X, 3, inference=1), TypeError, "got 1", "inference=True"),
    "equinox_momentum": (lambda: equinox(X, 3, momentum=1.5), ValueError, "1.5", "PyTorch"),
    "equinox_norm_without_normalizer": (
        lambda: equinox(X, 64, cls=jaxbn.equinox.Norm), TypeError, "64", r"Norm\(jaxbn\.BatchNorm\(\)",
    ),
    "equinox_norm_no_vmap": (
        lambda: equinox(X[0], jaxbn.BatchNorm(axis_name="b"), 3, cls=jaxbn.equinox.Norm), NameError, "'b'", "vmap",
    ),
    "haiku_layout": (
        lambda: haiku(jnp.ones((2, 3, 5, 5)), False, STATE_OF_HAIKU, create_scale=False),
        ValueError, r"\(1, 3\).*\(2, 3, 5, 5\) needs \(1, 1, 1, 5\)", "data_format",
    ),
    "haiku_feature_count": (lambda: haiku(jnp.ones((4, 5))), ValueError, r"\(1, 3\).*\[1, 5\]", "match"),
    "haiku_state_of_another": (
        lambda: haiku(jnp.ones((4, 5)), True, STATE_OF_HAIKU, seen=jnp.ones((4, 5))), ValueError,
        r"\(1, 3\).*\(4, 5\) needs \(1, 5\)", "that init returned",
    ),
    "haiku_no_state": (lambda: haiku(X, False, {}), ValueError, "no statistics", "transform_with_state"),
    "haiku_norm_no_state": (
        lambda: haiku(X, False, {}, cls=jaxbn.haiku.Norm, normalizer=BN), ValueError, "no statistics", "init returned",
    ),
    "haiku_no_axis": (lambda: haiku(cross_replica_axis="b"), NameError, "no mapped axis 'b'", r"jax\.vmap"),
    "haiku_mode": (lambda: haiku(X, 1), TypeError, "is_training must be a bool, got 1", "is_training=True"),
    "haiku_decay": (lambda: haiku(decay_rate=1.5), ValueError, r"decay_rate must lie.*1\.5", "PyTorch"),
    "haiku_no_decay": (lambda: haiku(decay_rate=None), TypeError, "got None", r"BatchNorm\(momentum=None"),
    "haiku_init_of_nothing": (
        lambda: haiku(create_scale=False, scale_init=jnp.ones), ValueError, "scale_init", "create_scale=True",
    ),
    "haiku_scale_twice": (
        lambda: haiku(call={"scale": X}), ValueError, "at call time if", "create_scale=False",
    ),
    "haiku_groups_without_axis": (
        lambda: haiku(cross_replica_axis_index_groups=[[0]]), ValueError, "got None", "axis",
    ),
    "reduced_axes": (lambda: jaxbn.moments(X, (0,)), TypeError, r"2 by position: \.\.\., \(0,\)", "feature_axes"),
}  # fmt: skip

# Words of other libraries: who is called, with what, and what the answer tells to write.
FOREIGN = {
    jaxbn.BatchNorm: {
        "eps": "epsilon=", "variance_epsilon": "epsilon=", "axis": "feature_axes", "axes": "feature_axes",
        "data_format": "feature_axes", "num_features": r"init\(0\.5\)", "features": "init",
        "decay": r"momentum=0\.5", "decay_rate": "momentum=", "center": "use_bias=",
        "create_offset": "use_bias=", "create_scale": "use_scale=", "scale": "use_scale=",
        "affine": "use_scale=.*use_bias=", "train": r"apply\(.*training=True", "training": r"apply\(",
        "is_training": r"apply\(", "use_running_average": r"apply\(.*training=False",
        "cross_replica_axis": "axis_name=", "scale_init": r"init\(.*scale_init=", "mask": "weights=",
        "track_running_stats": "drop the state", "renorm": "BatchRenorm", "name": "nothing",
        "virtual_batch_size": "GhostBatchNorm", "synchronized": "axis_name", "key": "init",
    },
    jaxbn.BatchRenorm: {"eps": r"BatchNorm\(epsilon=", "decay": "momentum=", "axis": r"BatchNorm\(feature_axes"},
    jaxbn.Gather: {"eps": r"BatchNorm\(epsilon=", "num_features": "init"},
    functools.partial(jaxbn.GhostBatchNorm, BN, 2): {"momentum": r"BatchNorm\(momentum=", "axis": "feature_axes"},
    functools.partial(BN.apply, PARAMS, STATE, X): {
        "train": r"training=0\.5", "is_training": "training=", "use_running_average": "training=not",
        "inference": "training=not", "deterministic": "training=not",
    },
    functools.partial(BN.apply, PARAMS, STATE, X, True): {
        "mask": r"weights=0\.5", "where": "weights=", "decay": "momentum=", "eps": "epsilon=", "axis": "feature_axes",
    },
    functools.partial(RENORM.apply, *RENORM.init(3), X, True): {"mask": "weights=", "decay": "momentum="},
    functools.partial(jaxbn.GhostBatchNorm(BN, 2).apply, PARAMS, STATE, X, True): {"mask": "weights="},
    functools.partial(jaxbn.Gather(BN).apply, PARAMS, STATE, X, True): {"mask": "weights="},
    functools.partial(jaxbn.Gather(BN).apply, PARAMS, STATE, X): {"train": "training="},
    functools.partial(jaxbn.apply, PARAMS, STATE, X): {"train": "training=", "is_training": "training="},
    functools.partial(jaxbn.apply, PARAMS, STATE, X, True): {"mask": "weights="},
    functools.partial(jaxbn.init, 3): {"eps": "epsilon=", "axis": "feature_axes", "train": "training="},
    functools.partial(jaxbn.moments, X): {"axis": "feature_axes", "axes": "feature_axes", "mask": "weights="},
    functools.partial(jaxbn.normalize, X, X[0], X[0]): {
        "eps": "epsilon=", "gamma": "scale=", "beta": "bias=", "offset": "bias=", "axis": "feature_axes",
    },
    functools.partial(jaxbn.normalize, X, X[0]): {"variance": "var="},
    functools.partial(jaxbn.update_running, STATE, jaxbn.moments(X)): {"decay": "momentum="},
    functools.partial(equinox, X, 3): {
        "epsilon": r"eps=0\.5", "affine": "channelwise_affine=", "training": "inference=not", "decay": "momentum=",
        "num_features": "input_size=",
    },
    haiku: {
        "epsilon": r"eps=0\.5", "momentum": r"decay_rate=0\.5", "use_bias": "create_offset=", "affine": "create_scale=",
        "feature_axes": "data_format", "axis_name": "cross_replica_axis=",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "word", "remedy"),
    [(call, *answer) for call, words in FOREIGN.items() for answer in words.items()],
)
def test_words_of_other_libraries_are_answered_in_ours(call, word, remedy):
    with pytest.raises(TypeError) as caught:
        call(**{word: 0.5})
    message = str(caught.value)
    assert f"has no argument {word}, got {word}=0.5. Write " in message, message
    assert re.search(remedy, message.split(". Write ")[1]), message
    assert message.endswith("."), message


def test_an_error_from_within_is_passed_on():
    def scale_init(key, shape, dtype):
        raise TypeError("scale_init() got an unexpected keyword argument 'eps'")

    with pytest.raises(TypeError, match="scale_init"):
        BN.init(3, scale_init=scale_init)


def test_layers_stay_values_that_travel():
    for layer in (jaxbn.BatchNorm(epsilon=0.5), RENORM, jaxbn.GhostBatchNorm(BN, 2)):
        assert pickle.loads(pickle.dumps(layer)) == layer == copy.deepcopy(layer)
        assert dataclasses.replace(layer) == layer
    assert pickle.loads(pickle.dumps(jaxbn.moments)) is jaxbn.moments


# What asks for which package, and the extra that brings it.
NEEDS_A_PACKAGE = [
    ("jaxbn.linen", "flax", "flax"),
    ("import jaxbn.linen", "flax", "flax"),
    ("import jaxbn.nnx", "flax", "flax"),
    ("from jaxbn import nnx", "flax", "flax"),
    ("import jaxbn.equinox", "equinox", "equinox"),
    ("jaxbn.haiku", "haiku", "haiku"),
    ("jaxbn.reestimate(None, jaxbn.init(3)[1], [], progress=True)", "tqdm", "progress"),
    ("jaxbn.convert.load('a.safetensors')", "safetensors", "convert"),
    ("jaxbn.convert.load('a')", "orbax", "diagnose"),
    ("jaxbn.diagnose.diagnose(jaxbn.init(3)).plot('a.png')", "matplotlib", "diagnose"),
]
NEEDS_OPTAX = [
    ("import jaxbn.linen", "optax", "flax"),
    ("jaxbn.optim.clip_scale()", "optax", "optax"),
]
WITHOUT_PACKAGES = """
import json, sys
packages, statements = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(packages))
import jaxbn, jaxbn.convert
for statement in statements:
    try:
        exec(statement)
        print("nothing was missing")
    except ImportError as error:
        print(str(error).replace(chr(10), " "))
"""


@pytest.mark.parametrize("needs", [NEEDS_A_PACKAGE, NEEDS_OPTAX], ids=["all", "optax"])
def test_a_package_that_is_missing_names_its_extra(needs, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "_METADATA").touch()
    (tmp_path / "a.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    statements, packages, _ = zip(*needs, strict=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, json.dumps([packages, statements])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(jaxbn.__file__).parents[1])},
        timeout=120,
    )
    messages = done.stdout.splitlines()
    assert len(messages) == len(needs), done.stderr
    for (statement, package, extra), message in zip(needs, messages, strict=True):
        assert f"pip install 'jaxbn[{extra}]'" in message, statement
        assert package in message, statement


def test_a_mistake_inside_jit_is_found_while_tracing():
    with pytest.raises(ValueError, match="x of shape"):
        jax.jit(lambda x: apply(x))(jnp.ones((4, 5)))
    with pytest.raises(TypeError, match="boolean scalar"):
        jax.jit(lambda flag: apply(training=flag))(jnp.ones(2, bool))
