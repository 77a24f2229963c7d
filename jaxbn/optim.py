"""Optimizing models with normalization: masks, labels, penalties, limits and averages."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxbn._averages import AverageState, ModelAverage
from jaxbn._dtypes import upcast, widest
from jaxbn._param_roles import map_roles
from jaxbn._typing import Array, PyTree
from jaxbn._values.canonical import as_number, as_settled, known

if TYPE_CHECKING:
    import optax

__all__ = [
    "AverageState",
    "ModelAverage",
    "clip_scale",
    "decay_mask",
    "norm_labels",
    "scale_penalty",
]

AverageState.__module__ = ModelAverage.__module__ = __name__


def decay_mask(params: PyTree) -> PyTree:
    """Tells which params weight decay is meant for: kernels, but no scale and no bias.

    Decaying the scale of a norm, or of what stands before one, changes no function, only
    the learning rate. What a param is follows from its name, its neighbours and their
    shapes, never from its rank, so layers stacked by `scan` or `vmap`, and scales of shape
    (1, ..., C), are found as well. A norm is a dict, a NamedTuple or a module that holds
    a scale and no kernel, and besides it statistics, a bias (of the scale's shape where
    that is called `weight`) or a name such as norm, bn or ln: batch, layer, group and
    instance norm alike. A `scale` or `gamma` alone, as of a LayerScale, is no norm's.

    Args:
        params: Linen params, an `nnx.State`, Haiku params, or any pytree.

    Returns:
        A pytree of the structure of params, False for the scale and bias of every norm,
        for every other scale and bias and for running statistics, True otherwise.

    Raises:
        TypeError: params is a single array, whose role nothing tells.

    Example:
        >>> import jaxbn, jaxbn.optim, jax.numpy as jnp, optax
        >>> params = {
        ...     "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
        ...     "bn": jaxbn.BatchNormParams(jnp.ones((1, 3)), jnp.zeros((1, 3))),
        ... }
        >>> mask = jaxbn.optim.decay_mask(params)
        >>> mask["dense"], mask["bn"]
        ({'bias': False, 'kernel': True}, BatchNormParams(scale=False, bias=False))
        >>> tx = optax.adamw(1e-3, mask=jaxbn.optim.decay_mask)

    References:
        van Laarhoven, "L2 regularization versus batch and weight normalization", 2017.

    Differs from the mask `p.ndim != 1` of Optax's documentation, which decays stacked
    norms and those of Haiku.
    """
    return map_roles(lambda role, _: role == "other", params)


def norm_labels(params: PyTree) -> PyTree:
    """Labels params "norm" (scale and bias of every norm) or "other".

    For `optax.multi_transform`, to freeze the norms or to train nothing else. A frozen
    layer is also called with `training=False`, so that its statistics stay.

    Args:
        params: As for `decay_mask`.

    Returns:
        A pytree of the structure of params, of strings.

    Raises:
        TypeError: params is a single array.

    Example:
        >>> import jaxbn.optim, optax
        >>> freeze_norms = optax.multi_transform(
        ...     {"norm": optax.set_to_zero(), "other": optax.sgd(0.1)},
        ...     jaxbn.optim.norm_labels,
        ... )
        >>> train_norms_only = optax.multi_transform(
        ...     {"norm": optax.sgd(0.1), "other": optax.set_to_zero()},
        ...     jaxbn.optim.norm_labels,
        ... )

    References:
        Frankle, Schwab and Morcos, "Training BatchNorm and only BatchNorm", 2021.
    """
    norm = {"scale", "norm bias"}
    return map_roles(lambda role, _: "norm" if role in norm else "other", params)


def scale_penalty(params: PyTree, *, l1: float = 0.0, l2: float = 0.0) -> Array:
    r"""Returns a penalty on the scales of all norms, to be added to the loss.

    .. math::
        l_1 \sum |\gamma| + l_2 \sum \gamma^2

    With `l1`, scales become 0 and their channels can be pruned (network slimming): its
    gradient at 0 is 0, so that they stay there.

    Args:
        params: As for `decay_mask`.
        l1: The weight of the sum of magnitudes.
        l2: The weight of the sum of squares.

    Returns:
        A scalar, at least float32; 0 for a model without norms.

    Raises:
        TypeError: params is a single array.
        ValueError: l1 or l2 is negative.

    Example:
        >>> import jaxbn, jaxbn.optim
        >>> params, _ = jaxbn.init(4)
        >>> print(jaxbn.optim.scale_penalty(params, l1=0.1, l2=1.0))
        4.4

    References:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming",
        2017.
    """
    weights = (as_settled(name, w, "0 for none.") for name, w in (("l1", l1), ("l2", l2)))
    values = (value for value in map(known, weights) if value is not None)
    if not all(value >= 0 for value in values):
        raise ValueError(
            f"l1 and l2 must not be negative, got {l1} and {l2}. The penalty is added to "
            "a loss that is minimized."
        )

    def penalty(role: str, leaf: Array) -> Array | None:
        if role != "scale":
            return None
        wide = upcast(leaf)
        # JAX's derivative of `abs` at 0 is 1, that of `sign` 0 everywhere.
        magnitude = wide * jnp.sign(wide).conj()
        return l1 * magnitude.real.sum() + l2 * jnp.square(jnp.abs(wide)).sum()

    terms = jax.tree.leaves(map_roles(penalty, params))
    dtype = widest(jnp.dtype(jnp.float32), *(term.dtype for term in terms))
    return sum((term.astype(dtype) for term in terms), jnp.zeros((), dtype))


def clip_scale(
    minimum: float | None = 0.0, maximum: float | None = None
) -> "optax.GradientTransformation":
    r"""Returns a transformation that keeps the scales of all norms within limits.

    .. math::
        u' = \mathrm{clip}(\gamma + u, \mathrm{minimum}, \mathrm{maximum}) - \gamma

    Last in `optax.chain`, since it sees what is added to the scale, up to the rounding of
    that addition. Other params are left alone.

    Args:
        minimum: The smallest scale, or None.
        maximum: The largest scale, or None.

    Returns:
        An `optax.GradientTransformation` whose `update` needs `params`.

    Raises:
        ImportError: Optax is not installed; nothing else in this module needs it.
        ValueError: minimum exceeds maximum, or `update` is called without params.

    Example:
        >>> import jax.numpy as jnp, jaxbn, jaxbn.optim, optax
        >>> tx = optax.chain(optax.sgd(1.0), jaxbn.optim.clip_scale(minimum=0.0))
        >>> params, _ = jaxbn.init(2)
        >>> grads = jaxbn.BatchNormParams(jnp.array([0.5, 3.0]), jnp.zeros(2))
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> print(optax.apply_updates(params, updates).scale)
        [0.5 0. ]
    """
    try:
        import optax
    except ImportError as error:
        raise ImportError(
            "jaxbn.optim.clip_scale needs the package optax, which is not installed. Run "
            "pip install 'jaxbn[optax]'."
        ) from error
    minimum, maximum = _as_limit("minimum", minimum), _as_limit("maximum", maximum)
    if minimum is not None and maximum is not None and not minimum <= maximum:
        raise ValueError(
            f"minimum must not exceed maximum, got {minimum} and {maximum}. Swap them."
        )

    def update(updates: PyTree, state: optax.OptState, params: PyTree | None = None):
        if params is None:
            raise ValueError(
                "clip_scale limits the params after the update, but got no params. Call "
                "tx.update(grads, opt_state, params)."
            )

        def clip(role: str, leaf: Array, change: Array) -> Array:
            if role != "scale":
                return change
            after = jnp.clip(leaf + change.astype(leaf.dtype), minimum, maximum)
            return (after - leaf).astype(change.dtype)

        return map_roles(clip, params, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _as_limit(name: str, limit: float | None) -> float | None:
    return None if limit is None else as_number(name, limit, "Or pass None for no limit.")
