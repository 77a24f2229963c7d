"""Which axes carry features and which are averaged over."""

import operator

import jax.numpy as jnp

from jaxbn._typing import Array, Axes, Shape


def as_axes(feature_axes: object) -> Axes:
    """Returns `feature_axes` as an int or a tuple of ints, whatever sequence it was."""
    try:
        if isinstance(feature_axes, (list, tuple)):
            return tuple(operator.index(axis) for axis in feature_axes)
        return operator.index(feature_axes)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(
            f"feature_axes must be an int or a sequence of ints, got {feature_axes!r}. "
            "Write feature_axes=-1 for channels last, feature_axes=1 for channels first."
        ) from None


def canonical_axes(feature_axes: Axes, shape: Shape) -> tuple[int, ...]:
    """Returns the feature axes of an array of `shape`, non-negative and ascending."""
    ndim = len(shape)
    axes = (feature_axes,) if isinstance(feature_axes, int) else feature_axes
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"feature axis {axis} is out of range for x of shape {shape}, which has "
                f"rank {ndim}. Choose feature_axes within [{-ndim}, {ndim - 1}]."
            )
    canonical = tuple(sorted(axis % ndim for axis in axes))
    if len(set(canonical)) != len(canonical):
        raise ValueError(
            f"feature_axes {axes} name an axis of x of shape {shape} twice. "
            "Name each axis once."
        )
    return canonical


def reduction_axes(feature_axes: Axes, shape: Shape) -> tuple[int, ...]:
    """Returns the axes of an array of `shape` that statistics are taken over."""
    reduced, features = divided_axes(feature_axes, shape)
    if not reduced:
        raise no_axis_left(features, shape)
    return reduced


def divided_axes(feature_axes: Axes, shape: Shape) -> tuple[tuple[int, ...], Shape]:
    """Returns the axes of an array of `shape` that are reduced, and the features' shape."""
    kept = canonical_axes(feature_axes, shape)
    reduced = tuple(axis for axis in range(len(shape)) if axis not in kept)
    return reduced, tuple(shape[axis] for axis in kept)


def no_axis_left(features: Shape, shape: Shape) -> ValueError:
    """Returns the error of an x of `shape` that is all features."""
    return ValueError(
        f"x of shape {shape} has no axis to average over besides its features {features}. "
        "Give x a leading batch axis, e.g. x[None], or fewer feature_axes; for one example "
        "under jax.vmap, make the layer with the axis_name of the vmap."
    )


def feature_shape(feature_axes: Axes, shape: Shape) -> Shape:
    """Returns the shape of the statistics of an array of `shape`."""
    return tuple(shape[axis] for axis in canonical_axes(feature_axes, shape))


def feature_sizes(num_features: int | Shape, feature_axes: Axes) -> Shape:
    """Returns `num_features` as a shape with one size for each feature axis."""
    try:
        sizes = num_features if isinstance(num_features, tuple) else (num_features,)
        features = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise TypeError(
            f"num_features must be an int or a tuple of ints, got {num_features!r}. "
            "It is the size of the feature axis: x.shape[-1] for channels last."
        ) from None
    axes = (feature_axes,) if isinstance(feature_axes, int) else feature_axes
    if len(features) != len(axes) or min(features, default=0) < 0:
        raise ValueError(
            f"num_features must hold {len(axes)} non-negative sizes, got {num_features}. "
            f"Give one for each of feature_axes={feature_axes}."
        )
    return features


def expand(per_feature: Array, axes: tuple[int, ...]) -> Array:
    """Gives a per-feature array the rank of x, with ones on the reduced `axes`."""
    return jnp.expand_dims(per_feature, axes)
