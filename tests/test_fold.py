"""Folding: every kind of kernel against float64 NumPy, whole models, what is refused."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.drawn_variables import draw_variables

RNG = np.random.default_rng(0)


def trained(features, epsilon=1e-3, **fields):
    """Returns a norm as after training, and its affine map (a, c) in float64."""
    bn = jaxbn.BatchNorm(epsilon=epsilon, **fields)
    draw = lambda low, high: jnp.asarray(RNG.uniform(low, high, features), jnp.float32)
    params = jaxbn.BatchNormParams(draw(-2, 2), draw(-1, 1))
    state = jaxbn.BatchStats(draw(-3, 3), draw(0.05, 4))
    wide = [np.asarray(a, np.float64) for a in (*params, state.mean, state.var)]
    slope = wide[0] / np.sqrt(wide[3] + epsilon)
    return bn, params, state, slope, wide[1] - slope * wide[2]


def dense(x, kernel):
    return x @ kernel


def convolution(groups=1, stride=1, padding=((0, 0), (0, 0))):
    """Returns a convolution of NHWC by HWIO, written as loops over the kernel."""

    def apply(x, kernel):
        x = np.pad(x, ((0, 0), *padding, (0, 0)))
        height, width, size_in, out = kernel.shape
        rows = (x.shape[1] - height) // stride + 1
        columns = (x.shape[2] - width) // stride + 1
        y = np.zeros((len(x), rows, columns, out))
        for g in range(groups):
            into = slice(g * out // groups, (g + 1) * out // groups)
            part = x[..., g * size_in : (g + 1) * size_in]
            for i, j in np.ndindex(height, width):
                seen = part[
                    :, i : i + rows * stride : stride, j : j + columns * stride : stride
                ]
                y[..., into] += seen @ kernel[i, j, :, into]
        return y

    return apply


def transposed(stride):
    """Returns a transposed convolution of NHWC by (H, W, in, out), written as sums."""

    def apply(x, kernel):
        _, rows, columns, _ = x.shape
        height, width = kernel.shape[:2]
        y = np.zeros(
            (
                len(x),
                (rows - 1) * stride + height,
                (columns - 1) * stride + width,
                kernel.shape[3],
            )
        )
        for i, j in np.ndindex(rows, columns):
            place = np.einsum("nc,hwco->nhwo", x[:, i, j], kernel)
            y[:, i * stride : i * stride + height, j * stride : j * stride + width] += place
        return y

    return apply


# A linear map in float64, its kernel as that map takes it, and the features that go in.
SAME = ((1, 1), (1, 1))
LINEAR = {
    "dense": (dense, (5, 6), 5),
    "conv": (convolution(), (3, 2, 4, 6), 4),
    "conv_padded": (convolution(padding=SAME, stride=2), (3, 3, 4, 6), 4),
    "grouped": (convolution(groups=2), (2, 2, 3, 4), 6),
    "depthwise": (convolution(groups=4), (2, 2, 1, 8), 4),
    "transposed": (transposed(2), (3, 3, 4, 5), 4),
}
# How other frameworks lay out the kernel of the same map, and what `fold` is told.
LAYOUTS = {
    "flax": (lambda kernel, groups: kernel, {}),
    "flax_transpose_kernel": (
        lambda kernel, groups: kernel.swapaxes(-1, -2),
        {"in_axis": -1, "out_axis": -2},
    ),
    "torch": (
        lambda kernel, groups: np.moveaxis(kernel, (-1, -2), (0, 1)),
        {"in_axis": 1, "out_axis": 0},
    ),
    # [H, W, in, multiplier] of Keras, and (in, out / groups, H, W) of PyTorch.
    "groups_on_in": (
        lambda kernel, groups: np.concatenate(np.split(kernel, groups, -1), -2),
        {"groups_on": "in"},
    ),
}


def groups_of(name):
    return {"grouped": 2, "depthwise": 4}.get(name, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LINEAR)
def test_a_norm_after_any_linear_layer(name, layout):
    linear, shape, features = LINEAR[name]
    kernel = RNG.normal(size=shape)
    x = RNG.normal(size=(2, features) if name == "dense" else (2, 5, 4, features))
    bn, params, state, slope, offset = trained(shape[-1])
    affine = jaxbn.as_affine(params, state, bn)
    lay, told = LAYOUTS[layout]
    told = {"groups": groups_of(name), **told}
    for bias in (None, RNG.normal(size=shape[-1])):
        want = slope * (linear(x, kernel) + (0 if bias is None else bias)) + offset
        given = None if bias is None else jnp.asarray(bias, jnp.float32)
        laid = jnp.asarray(lay(kernel, groups_of(name)), jnp.float32)
        got, new_bias = jaxbn.fold(laid, given, affine, **told)
        assert got.shape == laid.shape
        back = np.asarray(unlay(got, layout, groups_of(name)), np.float64)
        y = linear(x, back) + np.asarray(new_bias, np.float64)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def unlay(kernel, layout, groups):
    """Returns a kernel as the float64 map takes it."""
    kernel = np.asarray(kernel)
    if layout == "flax_transpose_kernel":
        return kernel.swapaxes(-1, -2)
    if layout == "torch":
        return np.moveaxis(kernel, (0, 1), (-1, -2))
    if layout == "groups_on_in":
        return np.concatenate(np.split(kernel, groups, -2), -1)
    return kernel


@pytest.mark.parametrize("name", ["dense", "conv", "grouped", "depthwise"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_before_a_linear_layer_without_padding(name, layout):
    linear, shape, features = LINEAR[name]
    kernel, bias = RNG.normal(size=shape), RNG.normal(size=shape[-1])
    x = RNG.normal(size=(2, features) if name == "dense" else (2, 5, 4, features))
    bn, params, state, slope, offset = trained(features)
    affine = jaxbn.as_affine(params, state, bn)
    lay, told = LAYOUTS[layout]
    told = {"groups": groups_of(name), "padding": "VALID", **told}
    laid = jnp.asarray(lay(kernel, groups_of(name)), jnp.float32)
    got = jaxbn.fold_into_next(laid, jnp.asarray(bias, jnp.float32), affine, **told)
    back = np.asarray(unlay(got[0], layout, groups_of(name)), np.float64)
    want = linear(slope * x + offset, kernel) + bias
    np.testing.assert_allclose(
        linear(x, back) + np.asarray(got[1], np.float64), want, rtol=1e-5, atol=2e-5
    )


def test_without_an_offset_padding_and_transposition_do_no_harm():
    affine = jaxbn.Affine(jnp.array([2.0, -1, 0.5, 3]), jnp.zeros(4))
    for name, told in (
        ("conv_padded", {"padding": "SAME"}),
        ("transposed", {"transposed": True}),
    ):
        linear, shape, features = LINEAR[name]
        kernel, x = RNG.normal(size=shape), RNG.normal(size=(2, 5, 4, features))
        got, bias = jaxbn.fold_into_next(
            jnp.asarray(kernel, jnp.float32), None, affine, **told
        )
        want = linear(x * np.asarray(affine.scale), kernel)
        np.testing.assert_allclose(linear(x, np.asarray(got, np.float64)), want, atol=1e-5)
        assert not bias.any()


def test_half_precision_is_rounded_once_and_jit_traces():
    bn, params, state, slope, offset = trained(3)
    kernel = jnp.asarray(RNG.normal(size=(4, 3)), jnp.bfloat16)
    folded = jax.jit(lambda *args: jaxbn.fold(kernel, None, jaxbn.as_affine(*args, bn)))
    got, bias = folded(params, state)
    assert got.dtype == bias.dtype == jnp.bfloat16
    want = jnp.asarray(np.asarray(kernel, np.float64) * slope, jnp.float32)
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))
    np.testing.assert_allclose(bias.astype(jnp.float32), offset, rtol=2**-8)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda bn: jaxbn.GhostBatchNorm(bn, 2),
        lambda bn: jaxbn.Gather(bn),
        jaxbn.BatchRenorm,
    ],
)
def test_a_variant_is_the_same_affine_map_in_inference(wrap):
    bn, params, state, slope, offset = trained(3)
    got = jaxbn.as_affine(params, state, wrap(bn))
    np.testing.assert_allclose(got.scale, slope, rtol=1e-6)
    np.testing.assert_allclose(got.bias, offset, rtol=1e-5, atol=1e-6)


# Whole models ---------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block whose convolutions have no bias but one, with every kind of pair."""

    bias: bool = False
    norms: bool = True

    @nn.compact
    def __call__(self, x, train):
        norm = lambda name: (
            jaxbn.linen.BatchNorm(not train, epsilon=1e-3, name=name)
            if self.norms
            else lambda x: x
        )
        y = norm("bn1")(nn.Conv(6, (3, 3), use_bias=self.bias, name="conv1")(x))
        y = nn.Conv(6, (2, 2), feature_group_count=3, name="conv2")(nn.relu(y))
        y = nn.relu(norm("bn2")(y))
        y = nn.ConvTranspose(6, (2, 2), (2, 2), use_bias=self.bias, name="up_conv")(y)
        x = norm("norm_proj")(nn.Conv(6, (1, 1), use_bias=self.bias, name="conv_proj")(x))
        y = norm("up_bn")(y)[:, ::2, ::2] + x
        return nn.Dense(2, name="head")(nn.relu(y).mean((1, 2)))


def spoiled(variables):
    """Returns variables as after training: no array is 0 or 1 throughout."""
    leaves, structure = jax.tree.flatten(variables)
    leaves = [
        leaf + jnp.asarray(RNG.uniform(0.2, 1, leaf.shape), leaf.dtype) for leaf in leaves
    ]
    return jax.tree.unflatten(structure, leaves)


X = jnp.asarray(RNG.normal(size=(2, 6, 6, 3)), jnp.float32)
BLOCK = Block()
VARIABLES = spoiled(draw_variables(BLOCK, X, train=False))


def infer(model, variables):
    return lambda x: model.apply(variables, x, train=False)


def test_a_linen_model_runs_as_it_is_with_folded_variables():
    folded = jaxbn.fold_tree(VARIABLES, epsilon=1e-3, pairs="by name", norms="folded")
    before, after = infer(BLOCK, VARIABLES), infer(BLOCK, folded)
    assert jaxbn.check_fold(before, after, X, tolerance=1e-5) <= 1e-5
    moved = folded["params"]["conv1"]["kernel"] != VARIABLES["params"]["conv1"]["kernel"]
    assert moved.all()
    # The variables are those of the same model, in structure, shapes and dtypes.
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert kinds(folded) == kinds(VARIABLES)
    # Only what a layer without a bias could not take is left of the norms.
    stats = folded["batch_stats"]
    assert stats["bn1"]["mean"].any()
    assert not stats["bn2"]["mean"].any()


NORMS = {
    "linen": lambda **fields: jaxbn.linen.BatchNorm(True, **fields),
    "flax": lambda **fields: nn.BatchNorm(True, **fields),
    "renorm": lambda **fields: jaxbn.linen.Norm(
        jaxbn.BatchRenorm(jaxbn.BatchNorm(**fields)), True
    ),
}


@pytest.mark.parametrize("fields", [{}, {"use_scale": False}, {"use_bias": False}])
@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1.001e-5, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_a_folded_norm_is_the_identity_bit_for_bit(norm, epsilon, fields):
    layer = NORMS[norm](epsilon=epsilon, **fields)
    x = jnp.asarray(RNG.normal(size=(64, 3)) * 10.0 ** RNG.integers(-9, 9, (64, 3)), "f4")
    variables = spoiled(layer.init(jax.random.key(0), x))
    params, stats = variables.get("params", {}), variables["batch_stats"]
    tree = {
        "params": {
            "net": {"fc": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}, "bn": params}
        },
        "batch_stats": {"net": {"bn": stats}},
    }
    pairs = [("net/fc", "net/bn")]
    folded = jaxbn.fold_tree(tree, epsilon=epsilon, pairs=pairs, norms="folded")
    parts = {name: part["net"].get("bn", {}) for name, part in folded.items()}
    assert jax.tree.structure(parts["batch_stats"]) == jax.tree.structure(stats)
    np.testing.assert_array_equal(jax.jit(layer.apply)(parts, x), x)


def test_statistics_in_half_precision_are_folded_in_float32():
    layer = jaxbn.linen.BatchNorm(
        True, epsilon=1e-3, param_dtype=jnp.bfloat16, force_float32_reductions=False
    )
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    tree = {name: {"bn": part} for name, part in variables.items()}
    tree["params"]["fc"] = {"kernel": jnp.eye(3)}
    pairs = [("fc", "bn")]
    folded = jaxbn.fold_tree(tree, epsilon=1e-3, pairs=pairs, norms="folded")
    x = jnp.asarray(RNG.normal(size=(64, 3)), jnp.float32)
    parts = {name: part["bn"] for name, part in folded.items()}
    np.testing.assert_array_equal(layer.apply(parts, x), x)


@dataclasses.dataclass(frozen=True)
class Deviation:
    """A normalizer of one's own: by |mean| + std instead of std, its affine map told."""

    def init(self, num_features):
        return None, jaxbn.BatchStats(jnp.zeros(num_features), jnp.ones(num_features))

    def apply(self, params, state, x, training):
        slope, offset = self.standardize(*self.running(state))
        return (x - state.mean[None]) * slope[None] + offset[None], state

    def running(self, state):
        return state.mean, state.var

    def standardize(self, mean, var):
        return 1 / (jnp.abs(mean) + jnp.sqrt(var)), jnp.ones_like(mean)

    def scale_and_bias(self, params):
        return None, None


def test_a_normalizer_of_ones_own_is_folded():
    norm = Deviation()
    state = jaxbn.BatchStats(*trained(3)[2][:2])
    x = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    scale, bias = jaxbn.as_affine(None, state, norm)
    want, _ = norm.apply(None, state, x, False)
    np.testing.assert_allclose(x * scale[None] + bias[None], want, rtol=1e-5, atol=1e-5)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), jaxbn.nnx.Norm(norm, 3))
    model.layers[1].mean[...] = state.mean
    folded = jaxbn.nnx.fold(model, pairs=[("layers/0", "layers/1")])
    assert jaxbn.check_fold(model, folded, x) < 1e-5


@pytest.mark.parametrize("lacking", ["running", "standardize", "scale_and_bias"])
def test_what_a_normalizer_must_tell_is_named_with_its_signature(lacking):
    known = {name: vars(Deviation)[name] for name in vars(Deviation) if name != lacking}
    with pytest.raises(TypeError, match=rf"{lacking}, which Mine.*def {lacking}\(self"):
        jaxbn.as_affine(None, STATE, type("Mine", (), known)())


def test_a_linen_model_without_norms_takes_the_variables_that_are_left():
    folded = jaxbn.fold_tree(
        VARIABLES,
        epsilon=dict.fromkeys(("bn1", "bn2", "up_bn", "norm_proj"), 1e-3),
        pairs="by name",
    )
    assert set(folded) == {"params"}
    assert set(folded["params"]["conv1"]) == {"kernel", "bias"}
    bare = Block(bias=True, norms=False)
    made = jax.eval_shape(lambda key: bare.init(key, X, train=False), jax.random.key(0))
    assert jax.tree.structure(folded) == jax.tree.structure(made)
    assert jaxbn.check_fold(infer(BLOCK, VARIABLES), infer(bare, folded), X) < 1e-5


def test_a_wrong_pair_is_told_by_the_check():
    pairs = [
        ("conv1", "bn1"),
        ("conv2", "up_bn"),
        ("up_conv", "bn2"),
        ("conv_proj", "norm_proj"),
    ]
    wrong = jaxbn.fold_tree(VARIABLES, epsilon=1e-3, pairs=pairs, norms="folded")
    with pytest.raises(ValueError, match=r"differs by .* at \(\d, \d\).*neighbours"):
        jaxbn.check_fold(infer(BLOCK, VARIABLES), infer(BLOCK, wrong), X)


class Chain(nn.Module):
    """A norm on both sides of a layer, the layers of jaxbn in a sequence."""

    padding: str

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: jaxbn.linen.Norm(jaxbn.BatchNorm(), not train)
        layers = [norm(), nn.Conv(4, (3, 3), padding=self.padding), norm()]
        return nn.Sequential(layers)(x)


def test_a_layer_takes_the_norms_of_both_sides():
    model = Chain("VALID")
    variables = spoiled(model.init(jax.random.key(0), X, train=False))
    folded = jaxbn.fold_tree(
        variables,
        epsilon=1e-5,
        pairs=[("Norm_0", "Conv_0"), ("Conv_0", "Norm_1")],
        options={"Conv_0": {"padding": "VALID"}},
        norms="folded",
    )
    assert jaxbn.check_fold(infer(model, variables), infer(model, folded), X) < 1e-5


class NnxBlock(nnx.Module):
    def __init__(self, rngs, norm=jaxbn.nnx.BatchNorm):
        self.bn0 = norm(3, rngs=rngs)
        self.conv1 = nnx.Conv(3, 6, (2, 2), padding="VALID", use_bias=False, rngs=rngs)
        self.bn1 = norm(6, epsilon=1e-2, rngs=rngs)
        self.up = nnx.Sequential(
            nnx.ConvTranspose(6, 4, (2, 2), transpose_kernel=True, rngs=rngs),
            jaxbn.nnx.Norm(jaxbn.BatchRenorm(), 4),
        )
        self.fc = nnx.Linear(4, 4, rngs=rngs)
        self.bn_fc = norm(4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(self.bn0(x))))
        return self.bn_fc(self.fc(nnx.relu(self.up(x)).mean((1, 2))))


@pytest.mark.parametrize("norm", [jaxbn.nnx.BatchNorm, nnx.BatchNorm])
def test_an_nnx_model_loses_its_norms(norm):
    model = NnxBlock(nnx.Rngs(0), norm)
    nnx.update(model, spoiled(nnx.state(model)))
    model.eval()
    pairs = [
        ("bn0", "conv1"),
        ("conv1", "bn1"),
        ("up/layers/0", "up/layers/1"),
        ("fc", "bn_fc"),
    ]
    folded = jaxbn.nnx.fold(model, pairs=pairs)
    assert jaxbn.check_fold(model, folded, X) < 1e-5
    state = nnx.to_pure_dict(nnx.state(folded))
    assert set(state) == {"conv1", "up", "fc"}
    assert state["conv1"]["bias"].shape == (6,)
    assert model.conv1.bias is None
    with pytest.raises(ValueError, match="bn0"):
        jaxbn.nnx.fold(model, pairs="by name")  # which do not tell where bn0 belongs
    known = jaxbn.find_pairs(nnx.to_pure_dict(nnx.state(model)))
    assert set(known) == {*pairs[1:]}


NAMES = {
    ("Conv_0", "BatchNorm_0"): True,
    ("conv1", "bn1"): True,
    ("conv", "conv_bn"): True,
    ("conv_proj", "norm_proj"): True,
    ("downsample_conv", "downsample_batch_norm"): True,
    ("fc2", "bn2"): True,
    ("layers_0", "layers_1"): True,
    (3, 4): True,
    ("layers_1", "layers_0"): False,
    ("layers_0", "layers_2"): False,
    ("conv1", "bn2"): False,
    ("ConvTranspose_0", "BatchNorm_1"): False,
}


@pytest.mark.parametrize("names", NAMES)
def test_names_tell_who_belongs_together(names):
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    tree = {"block": {names[0]: {"kernel": jnp.ones((2, 3))}, names[1]: stats}}
    want = ((f"block/{names[0]}", f"block/{names[1]}"),) if NAMES[names] else ()
    assert jaxbn.find_pairs(tree) == want
    tree["block"][names[1]] = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    assert jaxbn.find_pairs(tree) == ()


def test_among_namesakes_the_output_features_decide():
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    kernels = {"Conv_0": (2, 2, 4, 3), "Dense_0": (3, 5), "ConvTranspose_0": (2, 2, 3, 7)}
    tree = {name: {"kernel": jnp.ones(shape)} for name, shape in kernels.items()}
    tree["BatchNorm_0"] = stats
    assert jaxbn.find_pairs(tree) == (("Conv_0", "BatchNorm_0"),)
    del tree["Conv_0"]
    assert jaxbn.find_pairs(tree) == (("ConvTranspose_0", "BatchNorm_0"),)
    tree["Dense_0"] = {"kernel": jnp.ones((5, 3))}
    tree["Linear_0"] = {"kernel": jnp.ones((6, 3))}
    assert jaxbn.find_pairs(tree) == ()  # two that fit are none


# What is refused ------------------------------------------------------------------------

BN, PARAMS, STATE, *_ = trained(3)
AFFINE = jaxbn.as_affine(PARAMS, STATE, BN)
KERNEL = jnp.ones((3, 3, 2, 3))
HALF = {"kernel": jnp.full((1, 1, 2, 3), 3e3, jnp.float16)}
TREE = {
    "conv": {"kernel": KERNEL},
    "bn": {"mean": STATE.mean, "var": STATE.var, "bias": PARAMS.bias},
}


def fold_next(**options):
    return jaxbn.fold_into_next(jnp.ones((3, 3, 3, 2)), None, AFFINE, **options)


def fold_tree(tree=TREE, epsilon=1e-5, pairs="by name", **options):
    return jaxbn.fold_tree(tree, epsilon=epsilon, pairs=pairs, **options)


def with_bn(**arrays):
    return {**TREE, "bn": {**TREE["bn"], **arrays}}


def affine(field, value, params=PARAMS, state=STATE):
    return jaxbn.as_affine(params, state._replace(**{field: value}), BN)


def test_a_feature_that_never_varied_is_folded_exactly():
    state = STATE._replace(var=jnp.zeros(3))
    kernel, bias = jaxbn.fold(jnp.eye(3), None, jaxbn.as_affine(PARAMS, state, BN))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    want = (np.float64(x) - np.float64(STATE.mean)) / np.sqrt(BN.epsilon)
    want = want * np.float64(PARAMS.scale) + np.float64(PARAMS.bias)
    np.testing.assert_allclose(x @ kernel + bias[None], want, rtol=1e-4, atol=1e-2)


REFUSED = {
    "negative_var": (
        lambda: affine("var", jnp.array([1.0, -1, 1])),
        r"var=-1.0 at feature \[1\]",
        "Re-estimate",
    ),
    "negative_var_in_jit": (
        lambda var=-STATE.var: jax.jit(lambda: affine("var", var))(),
        "var=-",
        "Re-estimate",
    ),
    "nan_mean": (lambda: affine("mean", STATE.mean * jnp.nan), "mean=nan", "finite"),
    "shape": (
        lambda: affine("var", jnp.ones(4)),
        r"var of shape \(4,\)|mean of shape",
        "same layer",
    ),
    "activation": (
        lambda: jaxbn.as_affine(PARAMS, STATE, jaxbn.BatchNorm(activation=jax.nn.relu)),
        "relu",
        "outside",
    ),
    "features": (
        lambda: jaxbn.fold(jnp.ones((2, 5)), None, AFFINE),
        r"\(3,\).*\(5,\)",
        "out_axis",
    ),
    "bias": (
        lambda: jaxbn.fold(KERNEL, jnp.ones(4), AFFINE),
        r"bias has the shape \(4,\)",
        "out_axis",
    ),
    "axes": (lambda: jaxbn.fold(KERNEL, None, AFFINE, in_axis=3), "two axes", "-2 and -1"),
    "groups": (lambda: jaxbn.fold(KERNEL, None, AFFINE, groups=2), "groups=2", "Check"),
    "groups_on": (lambda: jaxbn.fold(KERNEL, None, AFFINE, groups_on="x"), "'x'", "axis"),
    "padding_same": (lambda: fold_next(padding="SAME"), "SAME.*zeros", "VALID"),
    "padding_pairs": (lambda: fold_next(padding=[(1, 0), (0, 0)]), r"\(1, 0\)", "VALID"),
    "padding_unknown": (lambda: fold_next(), "not told", "VALID"),
    "padding_traced": (
        lambda: jax.jit(
            lambda c: jaxbn.fold_into_next(jnp.ones((3, 3, 3, 2)), None, jaxbn.Affine(c, c))
        )(jnp.zeros(3)),
        "not told",
        "VALID",
    ),
    "transposed": (lambda: fold_next(transposed=True), "transposed", "Keep"),
    "between": (lambda: fold_tree(pairs=[("conv", "relu", "bn")]), "relu", "Leave"),
    "no_pair": (lambda: fold_tree(pairs=[("conv", "bn1")]), "bn1.*'bn'", "slashes"),
    "twice": (lambda: fold_tree(pairs=[("conv", "bn")] * 2), "two pairs", "once"),
    "pairs_untold": (
        lambda: fold_tree(pairs=None),
        "By their names, bn is folded into conv",
        'pairs="by name"',
    ),
    "pairs_word": (lambda: fold_tree(pairs="by names"), "'by names'", r"\[\(linear"),
    "overflow": (
        lambda: jaxbn.fold(
            KERNEL.astype(jnp.float16), None, AFFINE._replace(scale=jnp.full(3, 1e5))
        ),
        "kernel holds 1e\\+05, and float16 ends at 6.55e\\+04",
        "float32",
    ),
    "overflow_of_the_bias": (
        lambda: jaxbn.fold_into_next(
            jnp.ones((3, 2), jnp.float16), None, AFFINE._replace(bias=jnp.full(3, 3e4))
        ),
        "folded bias holds 9e\\+04",
        "float32",
    ),
    "tree_overflow": (
        lambda: fold_tree({"bn": with_bn(var=jnp.zeros(3))["bn"], "conv": HALF}),
        "cannot fold bn and conv: the folded",
        "float32",
    ),
    "lonely": (
        lambda: fold_tree({"stem": TREE["conv"], "bn": TREE["bn"]}),
        "bn.*stem",
        "find_pairs",
    ),
    "epsilon_missing": (
        lambda: fold_tree(epsilon={"norm": 1e-5}),
        "cannot fold bn",
        "every norm",
    ),
    "tree_negative_var": (
        lambda: fold_tree(with_bn(var=-jnp.ones(3))),
        "cannot fold bn and conv: .*var=-1.0",
        "reestimate",
    ),
    "tree_nan": (
        lambda: fold_tree(with_bn(bias=jnp.full(3, jnp.nan))),
        "bn and conv: .*bias=nan",
        "finite",
    ),
    "tree_shape": (
        lambda: fold_tree(with_bn(mean=jnp.ones(4)), pairs=[("conv", "bn")]),
        "mean of shape",
        "same",
    ),
    "tree_padding": (
        lambda: fold_tree(
            {"bn": TREE["bn"], "c": {"kernel": jnp.ones((3, 3, 3, 1))}}, pairs=[("bn", "c")]
        ),
        "cannot fold bn and c: .*padding",
        "VALID",
    ),
    "options": (lambda: fold_tree(options={"Conv": {}}), "Conv.*conv", "paths"),
    "no_norm": (lambda: fold_tree({"conv": TREE["conv"]}), "no norm", "batch_stats"),
    "folded_epsilon": (
        lambda: fold_tree(
            {"params": {"conv": TREE["conv"]}, "batch_stats": {"bn": TREE["bn"]}},
            epsilon=2.0,
            norms="folded",
        ),
        "1 - epsilon, got epsilon=2.0",
        "removed",
    ),
    "folded_nnx": (lambda: fold_tree(norms="folded"), "single tree", "jaxbn.nnx.fold"),
    "check_shape": (
        lambda: jaxbn.check_fold(lambda x: x, lambda x: x[0], X),
        r"\(2, 6, 6, 3\)",
        "same outputs",
    ),
    "check_nan": (
        lambda: jaxbn.check_fold(lambda x: x, lambda x: x * jnp.nan, X),
        "nan",
        "inference",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_by_name(name):
    act, fact, remedy = REFUSED[name]
    with pytest.raises(ValueError, match="(?s)" + fact) as caught:
        act()
    assert re.search(remedy, str(caught.value)), str(caught.value)
    assert name.startswith("check_") or "jaxbn.check_fold" in str(caught.value)


def test_pairing_by_name_shows_what_it_paired(caplog):
    fold_tree()
    [record] = caplog.records
    assert record.name == "jaxbn"
    assert "bn is folded into conv" in record.getMessage()
    assert "jaxbn.check_fold" in record.getMessage()
    caplog.clear()
    fold_tree(pairs=[("conv", "bn")])
    assert not caplog.records


def test_a_refusal_leaves_the_variables_as_they_were():
    before = jax.tree.map(np.array, VARIABLES)
    broken = {
        **VARIABLES,
        "batch_stats": {
            **VARIABLES["batch_stats"],
            "bn2": {"mean": jnp.zeros(6), "var": -jnp.ones(6)},
        },
    }
    with pytest.raises(ValueError, match="cannot fold bn2 and conv2"):
        jaxbn.fold_tree(broken, epsilon=1e-3, pairs="by name")
    jax.tree.map(np.testing.assert_array_equal, VARIABLES, before)


def test_a_folded_norm_still_adds_its_residual_and_applies_its_activation():
    layer = jaxbn.linen.Norm(jaxbn.BatchNorm(activation=jax.nn.relu), True)
    variables = spoiled(layer.init(jax.random.key(0), X))
    tree = {name: {"bn": part} for name, part in variables.items()}
    tree["params"]["fc"] = {"kernel": jnp.eye(3)}
    pairs = [("fc", "bn")]
    folded = jaxbn.fold_tree(tree, epsilon=1e-5, pairs=pairs, norms="folded")
    parts = {name: part["bn"] for name, part in folded.items()}
    want = layer.apply(variables, X, residual=X)
    y = layer.apply(parts, X @ folded["params"]["fc"]["kernel"], residual=X)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


def test_the_state_that_orbax_saved_of_a_module_is_understood():
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    )
    plain = nnx.to_pure_dict(nnx.state(model))
    boxed = jax.tree.map(lambda leaf: {"value": leaf}, plain)
    assert jaxbn.find_pairs(boxed) == (("layers/0", "layers/1"),)
    pairs = jaxbn.find_pairs(boxed)
    folded = (jaxbn.fold_tree(tree, epsilon=1e-5, pairs=pairs) for tree in (plain, boxed))
    jax.tree.map(np.testing.assert_array_equal, *folded)
