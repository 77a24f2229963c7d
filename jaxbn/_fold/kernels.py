"""Folding: a trained norm becomes part of the kernel and bias of the layer beside it."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._dtypes import widest
from jaxbn._fold.affine import Affine, refused
from jaxbn._fold.checks import as_dtype_of_kernel, check_exact, check_features
from jaxbn._typing import Array, Pair


class KernelLayout(NamedTuple):
    """Where in a kernel the features are."""

    in_axis: int
    out_axis: int
    groups: int
    groups_on: str

    def spread(self, kernel: Array) -> Array:
        """Returns the kernel as [..., groups, in of a group, out of a group]."""
        axes, rank = (self.in_axis, self.out_axis), kernel.ndim
        if not all(-rank <= a < rank for a in axes) or axes[0] % rank == axes[1] % rank:
            raise refused(
                f"in_axis={axes[0]} and out_axis={axes[1]} do not name two axes of the "
                f"kernel of shape {kernel.shape}. Flax has them at -2 and -1."
            )
        if self.groups_on not in ("in", "out"):
            raise refused(
                f'groups_on must be "in" or "out", got {self.groups_on!r}. It names the '
                "axis that counts the features of all groups."
            )
        size = kernel.shape[axes[self.groups_on == "out"]]
        if self.groups < 1 or size % self.groups:
            raise refused(
                f"groups={self.groups} does not divide the {size} features of the kernel "
                f"of shape {kernel.shape}. Check groups, in_axis and out_axis."
            )
        kernel = jnp.moveaxis(kernel, axes, (-2, -1))
        if self.groups_on == "in":
            return kernel.reshape(*kernel.shape[:-2], self.groups, -1, kernel.shape[-1])
        kernel = kernel.reshape(*kernel.shape[:-1], self.groups, -1)
        return jnp.moveaxis(kernel, -2, -3)

    def join(self, grouped: Array) -> Array:
        """Undoes `spread`."""
        if self.groups_on == "out":
            kernel = jnp.moveaxis(grouped, -3, -2)
            kernel = kernel.reshape(*kernel.shape[:-2], -1)
        else:
            kernel = grouped.reshape(*grouped.shape[:-3], -1, grouped.shape[-1])
        return jnp.moveaxis(kernel, (-2, -1), (self.in_axis, self.out_axis))


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    affine: Affine,
    *,
    in_axis: int = -2,
    out_axis: int = -1,
    groups: int = 1,
    groups_on: Literal["in", "out"] = "out",
) -> Pair:
    r"""Returns the kernel and bias of a linear layer with the norm after it folded in.

    .. math::
        a (W x + b) + c = (a W) x + (a b + c)

    Exact for dense layers and all convolutions: grouped, depthwise, transposed, with any
    padding. The defaults fit the kernels of all of Flax's layers, but
    `ConvTranspose(transpose_kernel=True)`, where in_axis=-1, out_axis=-2. For PyTorch's
    Linear and Conv, in_axis=1, out_axis=0; for its ConvTranspose, in_axis=0, out_axis=1,
    and groups_on="in". For the depthwise kernels of Keras and TensorFlow, groups is the
    size of in_axis, and groups_on="in".

    Args:
        kernel: Of rank 2 or more; the axes besides in_axis and out_axis are spatial.
        bias: Of the shape (features,), or None for a layer without.
        affine: What the norm is in inference, from `as_affine`.
        in_axis: The axis of the kernel along which the features of the input lie.
        out_axis: That of the features of the output.
        groups: The number of groups of features, of a grouped convolution.
        groups_on: "out" where out_axis counts the features of all groups, and in_axis
            those of one; "in" where it is the other way round.

    Returns:
        `(kernel, bias)`: computed in float32, or wider where an array is, and returned
        in the dtype of the kernel. There is always a bias.

    Raises:
        ValueError: An axis is out of range, groups do not divide it, or the features of
            the kernel, the bias and the norm differ; the result is larger than the dtype of
            the kernel can hold.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> affine = jaxbn.Affine(jnp.array([2.0, 1.0]), jnp.array([0.0, 5.0]))
        >>> kernel, bias = jaxbn.fold(jnp.ones((3, 2)), None, affine)
        >>> print(kernel[0], bias)
        [2. 1.] [0. 5.]

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018, section 3.2.
    """
    layout = KernelLayout(in_axis, out_axis, groups, groups_on)
    kernel, bias, wide = _arrays(kernel, bias, affine)
    grouped = layout.spread(kernel).astype(wide)
    shape = grouped.shape[-3], 1, grouped.shape[-1]
    features = shape[0] * shape[2]
    check_features(kernel, bias, affine, features, features)
    slope, offset = (part.astype(wide) for part in affine)
    folded = grouped * jnp.expand_dims(slope.reshape(shape), tuple(range(grouped.ndim - 3)))
    if bias is not None:
        offset = offset + slope * bias.astype(wide)
    return _as_pair(layout.join(folded), offset, kernel.dtype)


def fold_into_next(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    affine: Affine,
    *,
    padding: str | int | Sequence[Any] | None = None,
    transposed: bool = False,
    in_axis: int = -2,
    out_axis: int = -1,
    groups: int = 1,
    groups_on: Literal["in", "out"] = "out",
) -> Pair:
    r"""Returns the kernel and bias of a linear layer with the norm before it folded in.

    .. math::
        W (a x + c) + b = (W a) x + (W c + b)

    Exact for a dense layer, and for a convolution whose padding is none, or made of
    values of x. Padding with zeros happens after the norm, whose offset the padded
    places do not get: there it is exact only if the norm's offset c is 0.

    Args:
        kernel: As for `fold`.
        bias: As for `fold`.
        affine: What the norm is in inference, from `as_affine`.
        padding: That of the convolution, as Flax's layers have it.
        transposed: Whether this is a transposed convolution, whose outputs see different
            parts of the kernel, so that it is exact only for c = 0.
        in_axis: As for `fold`, like all that follows.
        out_axis: As for `fold`.
        groups: As for `fold`.
        groups_on: As for `fold`.

    Returns:
        `(kernel, bias)`, as `fold` does.

    Raises:
        ValueError: As `fold` does; the result would not be exact.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> affine = jaxbn.Affine(jnp.array([2.0, 1.0]), jnp.array([0.0, 5.0]))
        >>> kernel, bias = jaxbn.fold_into_next(jnp.ones((2, 1)), None, affine)
        >>> print(kernel.ravel(), bias)
        [2. 1.] [5.]
    """
    layout = KernelLayout(in_axis, out_axis, groups, groups_on)
    kernel, bias, wide = _arrays(kernel, bias, affine)
    grouped = layout.spread(kernel).astype(wide)
    count, shape_in, shape_out = grouped.shape[-3:]
    check_features(kernel, bias, affine, count * shape_in, count * shape_out)
    check_exact(grouped.shape[:-3], affine, padding, transposed)
    slope, offset = (part.astype(wide).reshape(count, shape_in, 1) for part in affine)
    spatial = tuple(range(grouped.ndim - 3))
    total = (grouped.sum(spatial) * offset).sum(1).reshape(-1)
    if bias is not None:
        total = total + bias.astype(wide)
    folded = layout.join(grouped * jnp.expand_dims(slope, spatial))
    return _as_pair(folded, total, kernel.dtype)


def fold_beside(*arrays: Any, after: bool, **options: Any) -> Pair:
    """Returns `fold` for a norm after the layer, `fold_into_next` for one before it."""
    if not after:
        return fold_into_next(*arrays, **options)
    next_only = {"padding", "transposed"}
    return fold(*arrays, **{k: v for k, v in options.items() if k not in next_only})


def _arrays(
    kernel: ArrayLike, bias: ArrayLike | None, affine: Affine
) -> tuple[Array, Array | None, jnp.dtype]:
    """Returns the arrays of the layer, and the dtype that loses nothing of all."""
    kernel, bias = jnp.asarray(kernel), None if bias is None else jnp.asarray(bias)
    given = [array for array in (kernel, bias, *affine) if array is not None]
    wide = widest(jnp.dtype(jnp.float32), *(jnp.result_type(array) for array in given))
    return kernel, bias, wide


def _as_pair(kernel: Array, bias: Array, dtype: jnp.dtype) -> Pair:
    return (
        as_dtype_of_kernel("kernel", kernel, dtype),
        as_dtype_of_kernel("bias", bias, dtype),
    )
