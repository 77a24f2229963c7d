"""Code as a user writes it, which pyright checks: what comes out has the right type."""

import dataclasses
from typing import Any, NamedTuple, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxbn
import jaxbn.convert
import jaxbn.linen
import jaxbn.nnx
import jaxbn.optim
import jaxbn.tf1

x = np.ones((8, 3), np.float32)


def layers() -> None:
    bn = jaxbn.BatchNorm(momentum=0.9, axis_name="batch", activation=jax.nn.relu)
    params, state = bn.init(3, scale_init=jax.nn.initializers.zeros)
    assert_type(params.scale, jax.Array | None)
    assert_type(state.mean, jax.Array)
    y, state = bn.apply(params, state, x, training=True, weights=x[:, 0] > 0, residual=x)
    assert_type(y, jax.Array)
    assert_type(state, jaxbn.BatchStats)


def free_functions() -> None:
    params, state = jaxbn.init(3)
    assert_type(params, jaxbn.BatchNormParams)
    assert_type(state, jaxbn.BatchStats)
    assert_type(jaxbn.apply(params, state, x, True), tuple[jax.Array, jaxbn.BatchStats])
    renorm = jaxbn.BatchRenorm(jaxbn.BatchNorm())
    params, corrected = jaxbn.init(3, renorm)
    assert_type(corrected, jaxbn.RenormStats)
    _, corrected = jaxbn.apply(params, corrected, x, True, renorm, momentum=0.5)
    assert_type(corrected.renorm_std, jax.Array)


def wrappers() -> None:
    ghost = jaxbn.GhostBatchNorm(jaxbn.BatchRenorm(), 2, layout="strided")
    params, state = ghost.init(3)
    assert_type(params, jaxbn.BatchNormParams)
    assert_type(state, jaxbn.RenormStats)
    gatherer = jaxbn.Gather(jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 2))
    params, stats = jaxbn.init(3, gatherer)
    _, stats = gatherer.apply(params, stats, x, True)
    assert_type(stats, jaxbn.BatchStats)
    gathered: jaxbn.Gathered = jaxbn.gather(stats)
    _, gathered = gatherer.apply(params, gathered, x, True)
    assert_type(gathered.batch, jaxbn.Moments)


class Power(NamedTuple):
    mean: jax.Array
    var: jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Inherits(jaxbn.Normalizer[jaxbn.BatchNormParams, Power]):
    momentum: float = 0.9

    def init(self, num_features: int | tuple[int, ...]):
        one = jnp.ones(num_features)
        return jaxbn.BatchNormParams(one, None), Power(one, one)

    def standardize(self, mean: jax.Array, var: jax.Array):
        return jax.lax.rsqrt(var + 1e-6), None

    def track(self, state: Power, batch: jaxbn.Moments, *, momentum: float | None = None):
        return Power(batch.mean, batch.var)


class StandsAlone:
    def init(self, num_features: int | tuple[int, ...]) -> tuple[jax.Array, Power]:
        one = jnp.ones(num_features)
        return one, Power(one, one)

    def apply(
        self, params: jax.Array, state: Power, x: Any, training: bool | jax.Array
    ) -> tuple[jax.Array, Power]:
        return x * params, state


def own_normalizers() -> None:
    params, state = jaxbn.init(3, Inherits())
    assert_type(params.scale, jax.Array | None)
    assert_type(state, Power)
    assert_type(jaxbn.GhostBatchNorm(Inherits(), 2).init(3)[1], Power)
    scale, state = jaxbn.init(3, StandsAlone())
    assert_type(scale, jax.Array)
    assert_type(jaxbn.apply(scale, state, x, False, StandsAlone())[1], Power)


def pieces(key: jax.Array) -> None:
    batch = jaxbn.moments(x, weights=x[:, 0] > 0)
    assert_type(batch, jaxbn.Moments)
    state = jaxbn.update_running(jaxbn.init(3)[1], batch, momentum=None, ddof=1)
    assert_type(state.weight, jax.Array | None)
    assert_type(jaxbn.normalize(x, x[0], x[1], dtype="bfloat16"), jax.Array)
    assert_type(jaxbn.dropout(key, x, 0.5, True, scaled_at="inference"), jax.Array)
    affine = jaxbn.as_affine(*jaxbn.init(3))
    assert_type(jaxbn.fold(x, None, affine, groups_on="in"), tuple[jax.Array, jax.Array])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = jaxbn.linen.BatchNorm(use_running_average=not train, axis_name="batch")(x)
        assert_type(y, jax.Array)
        return jaxbn.linen.Norm(jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 2))(y, not train)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.bn = jaxbn.nnx.BatchNorm(3, rngs=rngs)
        self.own = jaxbn.nnx.Norm(StandsAlone(), 3)

    def __call__(self, x: jax.Array) -> jax.Array:
        assert_type(self.bn.mean[...], jax.Array)
        return self.own(self.bn(x))


def nnx_models() -> None:
    model = jaxbn.nnx.gather(Nnx(nnx.Rngs(0)))
    assert_type(model, Nnx)
    state = jaxbn.nnx.TrainState(model, optax.adamw(1e-3, mask=jaxbn.optim.decay_mask))
    assert_type(state.model, Nnx)
    assert_type(jaxbn.nnx.fold(state.model, pairs="by name"), Nnx)
    assert_type(jaxbn.optim.clip_scale(0.0), optax.GradientTransformation)


def other_libraries() -> None:
    layer = jaxbn.convert.from_torch(jaxbn.convert.load("model.safetensors"), "bn1")
    assert_type(layer.bn, jaxbn.BatchNorm)
    assert_type(layer.state.mean, jax.Array)
    tf1 = jaxbn.tf1.batch_norm(decay=0.9, data_format="NCHW")
    params, state = tf1.init((8, 3))
    y, state = tf1.apply(params, state, x, training=True)
    assert_type(y, jax.Array)
