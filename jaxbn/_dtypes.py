"""In which precision things are computed, and what may be computed with at all."""

import functools

import jax
import jax.numpy as jnp

from jaxbn._typing import Array, ArrayLike, DTypeLike, PyTree

# Spellings of PyTorch and of configurations.
_SHORT = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half", "float16"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "float32", "full"), "float32"),
    **dict.fromkeys(("fp64", "f64", "double", "float64"), "float64"),
}


def as_dtype(dtype: DTypeLike | None) -> jnp.dtype | None:
    """Returns `dtype` in the one spelling that compares and hashes, or None."""
    if dtype is None:
        return None
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        name = _SHORT.get(str(dtype).rpartition(".")[2])
        raise TypeError(
            f"a dtype must be one of JAX's, got {dtype!r}. Write "
            f"{f'jnp.{name}' if name else 'jnp.float32, jnp.bfloat16 or the like'}."
        ) from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"a normalized array must be floating or complex, got dtype {dtype}. Use "
            "jnp.float32, jnp.bfloat16 or the like."
        )
    return dtype


def as_float(x: ArrayLike) -> Array:
    """Returns `x` as an array, or explains that it must be floating or complex."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x must be floating or complex, got {x.dtype} of shape {x.shape}. Convert it "
            "first, e.g. x.astype(jnp.float32)."
        )
    return x


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which sums over elements of `dtype` are accumulated."""
    return widest(dtype, jnp.float32)


def refuse_half(tree: PyTree, name: str) -> None:
    """Raises if an array of the average `tree`, called `name`, is below float32."""
    if not any(_is_half(getattr(leaf, "dtype", None)) for leaf in jax.tree.leaves(tree)):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _is_half(getattr(leaf, "dtype", None)):
            name += jax.tree_util.keystr(path)
            raise TypeError(
                f"{name} is {leaf.dtype}, but an average is kept in float32 or wider: in "
                f"{leaf.dtype} its steps are below its last digit, and it stalls. Cast it, "
                f"and leave it out of what a policy casts: {name}.astype(jnp.float32)."
            )


@functools.cache
def _is_half(dtype: jnp.dtype | None) -> bool:
    inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
    return inexact and jnp.finfo(dtype).bits < 32


def widened(tree: PyTree) -> PyTree:
    """Returns the tree with its floating arrays in float32 or wider."""
    return jax.tree.map(
        lambda leaf: upcast(leaf) if _is_half(getattr(leaf, "dtype", None)) else leaf, tree
    )


@functools.cache
def widest(*dtypes: jnp.dtype) -> jnp.dtype:
    """Returns the dtype that holds all of `dtypes`, also under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def real_part(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of the real part of numbers of `dtype`."""
    return jnp.finfo(dtype).dtype


def upcast(x: Array) -> Array:
    """Returns `x` in the dtype in which its sums are accumulated."""
    return x.astype(at_least_float32(x.dtype))
