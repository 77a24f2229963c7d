"""Running statistics: how those of one batch enter the average, or are kept out of it."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._dtypes import widest
from jaxbn._sharding import reshard_like
from jaxbn._state import BatchStats
from jaxbn._statistics.moments import Moments
from jaxbn._typing import Array
from jaxbn._values.canonical import as_settled, as_whole, known

State = TypeVar("State", bound=Any)


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

    A feature whose new statistics are not finite numbers of the dtype of the state, or
    whose count is 0, keeps its state. No gradient flows into the result. A state below
    float32 moves only as far as its digits tell: train with one that is wider.

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
    ddof = check_ddof(ddof)
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
    remedy = "A schedule is evaluated by the caller: momentum=schedule(step)."
    value = known(as_settled("momentum", momentum, remedy))
    if value is not None and not 0 <= value <= 1:
        raise ValueError(
            f"momentum must lie in [0, 1], got {momentum}. It is the decay of the running "
            "average, as in Flax and Keras; PyTorch's momentum is one minus this."
        )


def check_ddof(ddof: Any) -> int:
    """Returns `ddof` as Python's int, or raises unless it is one and not negative."""
    ddof = as_whole("ddof", ddof, "Use 0, or 1 as in PyTorch.")
    if ddof < 0:
        raise ValueError(f"ddof must not be negative, got {ddof}. Use 0 or 1.")
    return ddof


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
    rate, weight = _rate(state, momentum)
    mean, var = (
        moved(state.mean, batch.mean, rate),
        moved(state.var, var, rate),
    )
    return stored(state, BatchStats(mean, var, weight), batch.count)


def like_state(batch: Moments, mean: Array) -> Moments:
    """Returns the moments with the sharding of the running mean."""
    batch = Moments(*batch[:3])
    if jax.typeof(batch.mean).sharding == jax.typeof(mean).sharding:
        return batch
    return Moments(*(reshard_like(array, mean) for array in batch))


def moved(old: Array, new: Array, rate: float | Array) -> Array:
    """Returns `old` moved toward `new` by `rate`, in the wider of their dtypes."""
    wide = widest(old.dtype, new.dtype)
    old, new = old.astype(wide), new.astype(wide)
    if isinstance(rate, int | float):
        return new if rate == 1 else old + jnp.asarray(rate).astype(wide) * (new - old)
    # A first batch that replaces an initial 1 shall not be rounded to the digits of 1.
    rate = rate.astype(wide)
    return jnp.where(rate < 1, old + rate * (new - old), new)


def stored(state: State, after: State, count: Array) -> State:
    """Returns `after` in the dtypes of `state`, where the batch has shown something.

    A feature of which any array would hold what is no finite number of its dtype keeps all
    that it had, so nothing poisons a state.
    """
    pairs = list(zip(after, state, strict=True))
    fitted = [None if old is None else new.astype(old.dtype) for new, old in pairs]
    sound = count > 0
    for array in fitted:
        sound = sound if array is None else sound & jnp.isfinite(array)
    kept = (
        None if new is None else lax.select(sound, new, old)
        for new, old in zip(fitted, state, strict=True)
    )
    return type(state)(*kept)


def _bessel(count: Array, ddof: int) -> Array:
    enough = count > ddof
    return jnp.where(enough, count / jnp.where(enough, count - ddof, 1), 1)


def _rate(
    state: BatchStats, momentum: float | Array | None
) -> tuple[float | Array, Array | None]:
    """Returns how far the state moves toward the batch, and the weight afterwards."""
    if momentum is not None and not isinstance(momentum, (int, float)):
        momentum = jnp.asarray(momentum).astype(state.var.dtype)
    if momentum is None:
        assert state.weight is not None
        weight = state.weight + 1
        return 1 / weight, weight
    if state.weight is None:
        return 1 - momentum, None
    weight = momentum * state.weight + (1 - momentum)
    return (1 - momentum) / jnp.where(weight > 0, weight, 1), weight
