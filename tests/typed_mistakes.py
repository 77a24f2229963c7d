"""Mistakes that a type checker tells: an unneeded `ignore` means one is told no more."""

# pyright: reportUnnecessaryTypeIgnoreComment=error

import jax
import jax.numpy as jnp

import jaxbn
import jaxbn.convert
import jaxbn.linen
import jaxbn.nnx
import jaxbn.tf1

x = jnp.ones((8, 3))
bn = jaxbn.BatchNorm()
params, state = bn.init(3)


def mistakes(key: jax.Array) -> None:
    jaxbn.BatchNorm(0.9)  # pyright: ignore[reportCallIssue]
    jaxbn.BatchNorm(eps=1e-3)  # pyright: ignore[reportCallIssue]
    jaxbn.BatchNorm(momentum="0.9")  # pyright: ignore[reportArgumentType]
    bn.momentum = 0.5  # pyright: ignore[reportAttributeAccessIssue]
    bn.init(3.0)  # pyright: ignore[reportArgumentType]
    bn.apply(params, state, x)  # pyright: ignore[reportCallIssue]
    bn.apply(state, params, x, True)  # pyright: ignore[reportArgumentType]
    bn.apply(params, state, [[1.0]], True)  # pyright: ignore[reportArgumentType]
    bn.apply(params, state, x, "train")  # pyright: ignore[reportArgumentType]
    bn.apply(params, state, x, True, mask=x > 0)  # pyright: ignore[reportCallIssue]
    bn.apply(params, state, x, True, adjustment=x)  # pyright: ignore[reportArgumentType]
    jaxbn.apply(params, state, x, True, jaxbn.BatchRenorm())  # pyright: ignore[reportArgumentType]
    jaxbn.apply(state, params, x, True, bn)  # pyright: ignore[reportArgumentType]
    jaxbn.init(3, jaxbn.BatchNorm)  # pyright: ignore[reportArgumentType]
    params.scale.sum()  # pyright: ignore[reportOptionalMemberAccess]
    print(params.gamma)  # pyright: ignore[reportAttributeAccessIssue]
    print(state.std)  # pyright: ignore[reportAttributeAccessIssue]
    jaxbn.BatchRenorm(jaxbn.GhostBatchNorm(bn, 2))  # pyright: ignore[reportArgumentType]
    jaxbn.GhostBatchNorm(bn)  # pyright: ignore[reportCallIssue]
    jaxbn.GhostBatchNorm(bn, 2, layout="blocks")  # pyright: ignore[reportArgumentType]
    jaxbn.GhostBatchNorm(bn, 2, tracking="mean")  # pyright: ignore[reportArgumentType]
    jaxbn.Gather(3)  # pyright: ignore[reportArgumentType]
    jaxbn.dropout(key, x, 0.5, True, scaled_at="both")  # pyright: ignore[reportArgumentType]
    affine = jaxbn.as_affine(params, state, bn)
    jaxbn.fold(x, None, affine, groups_on="left")  # pyright: ignore[reportArgumentType]
    jaxbn.merge_moments(jaxbn.moments(x), state)  # pyright: ignore[reportArgumentType]
    jaxbn.linen.BatchNorm(use_running_averages=True)  # pyright: ignore[reportCallIssue]
    jaxbn.linen.Norm(3)  # pyright: ignore[reportArgumentType]
    jaxbn.nnx.BatchNorm(3)  # pyright: ignore[reportCallIssue]
    jaxbn.tf1.batch_norm(data_format="NHCW")  # pyright: ignore[reportArgumentType]
    jaxbn.convert.from_equinox({}, variance="biased")  # pyright: ignore[reportArgumentType]
