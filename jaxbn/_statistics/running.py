"""Running statistics: how those of one batch enter the average, or are kept out of it."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._compat import is_traced
from jaxbn._sharding import reshard_like
from jaxbn._state import BatchStats
from jaxbn._statistics.moments import Moments
from jaxbn._typing import Array


def update_running(
    state: BatchStats,
    batch: Moments,
    *,
    momentum: float | Array | None = 0.99,
    ddof: int = 0,
) -> BatchStats:
    r"""Returns the running statistics after one more batch.

    .. math::
        s' = s + a\,(b - s), \qquad
        a = 1 - m, \quad
        a = \frac{1 - m}{w'},\; w' = m w + 1 - m, \quad
        a = \frac{1}{w'},\; w' = w + 1

    for the plain average, for the zero-debiased one (a state whose `weight` is not None)
    and for the cumulative mean (`momentum=None`). The batch variance enters multiplied by
    n / (n - ddof), where n is `batch.count`, and unchanged where n does not exceed ddof.

    A feature whose batch statistics are not finite, or whose count is 0, keeps its
    state. No gradient flows into the result.

    Args:
        state: The statistics before.
        batch: The moments of the batch, of the same features.
        momentum: The decay m in [0, 1], which may be traced; None for the mean of all
            batches so far, which needs a state with `weight`.
        ddof: 0 to track the biased variance (as Flax does), 1 for the unbiased one (as
            PyTorch does).

    Returns:
        `BatchStats` of the structure, shapes and dtypes of `state`.

    Raises:
        TypeError: The batch is complex and the state is not.
        ValueError: momentum lies outside [0, 1], or is None for a state without weight;
            the features of state and batch differ.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> _, state = jaxbn.BatchNorm().init(1)
        >>> batch = jaxbn.moments(jnp.array([[1.0], [3.0]]))
        >>> print(jaxbn.update_running(state, batch, momentum=0.5).mean)
        [1.]

    References:
        Ioffe and Szegedy, "Batch Normalization", 2015, section 3.1. Kingma and Ba,
        "Adam: A Method for Stochastic Optimization", 2015, section 3, for the debiasing.

    Differs from PyTorch, whose momentum is 1 - m. Differs from Haiku, TensorFlow and
    Optax in that the debiased average itself is stored: it is what inference reads, it
    stays right when the momentum changes from step to step, and the first batch simply
    replaces the initial values.
    """
    check_momentum(momentum)
    check_ddof(ddof)
    if momentum is None and state.weight is None:
        raise ValueError(
            "momentum=None averages all batches so far, which needs state.weight, but it "
            "is None. Make the state with BatchNorm(momentum=None).init(...)."
        )
    if jnp.shape(state.mean) != jnp.shape(batch.mean):
        raise ValueError(
            f"the state has features {jnp.shape(state.mean)} but the batch has features "
            f"{jnp.shape(batch.mean)}. Use the state that belongs to this layer."
        )
    check_real(state, batch.mean.dtype)
    return _update_running(state, batch, momentum, ddof)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _update_running(state, batch, momentum, ddof):
    return updated_stats(state, batch, momentum, ddof)


def check_momentum(momentum: float | Array | None) -> None:
    """Raises unless `momentum` is None, a decay in [0, 1] or a scalar array."""
    if momentum is None:
        return
    if jnp.ndim(momentum) != 0 or isinstance(momentum, (bool, str)):
        raise TypeError(
            f"momentum must be a number or a scalar array, got {momentum!r}. "
            "A schedule is evaluated by the caller: momentum=schedule(step)."
        )
    if not is_traced(momentum) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1], got {momentum}. It is the decay of the running "
            "average, as in Flax and Keras; PyTorch's momentum is one minus this."
        )


def check_ddof(ddof: int) -> None:
    """Raises unless `ddof` is a non-negative int."""
    if not isinstance(ddof, int) or isinstance(ddof, bool):
        raise TypeError(f"ddof must be an int, got {ddof!r}. Use 0, or 1 as in PyTorch.")
    if ddof < 0:
        raise ValueError(f"ddof must not be negative, got {ddof}. Use 0 or 1.")


def check_real(state: BatchStats, dtype: jnp.dtype) -> None:
    """Raises if a complex mean would have to be stored in a real state."""
    if jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"the batch is {dtype} but the running mean is {state.mean.dtype}, and would "
            "lose its imaginary part. Use BatchNorm(param_dtype=jnp.complex64)."
        )


def updated_stats(
    state: BatchStats, batch: Moments, momentum: float | Array | None, ddof: int
) -> BatchStats:
    """Returns `update_running` of checked arguments."""
    # Without the stop, differentiating a loss through two steps would differentiate the
    # first batch's statistics again.
    state, batch = lax.stop_gradient((state, batch))
    batch = like_state(batch, state.mean)
    var = batch.var * _bessel(batch.count, ddof) if ddof else batch.var
    sound = is_finite_batch(batch, var)
    rate, weight = _rate(state, momentum)
    if weight is not None and state.weight is not None:
        weight = jnp.where(sound, weight, state.weight)
    mean = move(state.mean, batch.mean, rate, sound)
    return BatchStats(mean, move(state.var, var, rate, sound), weight)


def like_state(batch: Moments, mean: Array) -> Moments:
    """Returns the moments with the sharding of the running mean."""
    batch = Moments(*batch[:3])
    if jax.typeof(batch.mean).sharding == jax.typeof(mean).sharding:
        return batch
    return Moments(*(reshard_like(array, mean) for array in batch))


def is_finite_batch(batch: Moments, var: Array) -> Array:
    """Tells which features of the batch may enter an average without spoiling it."""
    return (batch.count > 0) & jnp.isfinite(batch.mean) & jnp.isfinite(var)


def move(old: Array, new: Array, rate: float | Array, sound: Array) -> Array:
    """Returns `old` moved toward `new` by `rate` where `sound`, in the dtype of `old`."""
    step = jnp.asarray(rate).astype(old.dtype) * (new.astype(old.dtype) - old)
    return jnp.where(sound, old + step, old)


def _bessel(count: Array, ddof: int) -> Array:
    enough = count > ddof
    return jnp.where(enough, count / jnp.where(enough, count - ddof, 1), 1)


def _rate(
    state: BatchStats, momentum: float | Array | None
) -> tuple[float | Array, Array | None]:
    """Returns how far the state moves toward the batch, and the weight afterwards."""
    if isinstance(momentum, jax.Array):
        momentum = momentum.astype(state.var.dtype)
    if momentum is None:
        assert state.weight is not None
        weight = state.weight + 1
        return 1 / weight, weight
    if state.weight is None:
        return 1 - momentum, None
    weight = momentum * state.weight + (1 - momentum)
    return (1 - momentum) / jnp.where(weight > 0, weight, 1), weight
