"""What is trained (`BatchNormParams`) and what is tracked, by registered kinds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import jax.numpy as jnp

from jaxbn._compat import exported
from jaxbn._typing import Array, DTypeLike, Initializer, Key, Pair, Shape


@exported
class BatchNormParams(NamedTuple):
    """The trained scale and bias, each of the shape of the features.

    Example:
        >>> import jaxbn
        >>> params, _ = jaxbn.BatchNorm(use_bias=False).init(3)
        >>> params.scale.shape, params.bias
        ((3,), None)

    Attributes:
        scale: Multiplies the normalized input, or None with `use_scale=False`.
        bias: Added last, or None with `use_bias=False`.
    """

    scale: Array | None
    bias: Array | None


@runtime_checkable
class RunningStats(Protocol):
    """What the running statistics of a normalizer answer, whatever else they hold.

    `gather`, `reestimate`, `sync_state` and the Flax modules work on states alone, without
    the normalizer that they belong to. A NamedTuple of arrays with these two methods, made
    known by `register_stats`, is a full citizen there.

    Example:
        >>> import jaxbn
        >>> isinstance(jaxbn.BatchNorm().init(3)[1], jaxbn.RunningStats)
        True
    """

    @property
    def mean(self) -> Array:
        """Running mean, of the shape of the features."""
        ...

    @property
    def var(self) -> Array:
        """Running variance, likewise, real."""
        ...

    def renewed(self, mean: Array, var: Array) -> Self:
        """Returns the state of a layer that has seen a data set of these moments."""
        ...

    def pooled(self, pool: Callable[[Array, Array], Pair]) -> Self:
        """Returns the state of replicas pooled into one.

        `pool(mean, var)` returns the mean and the variance of what all replicas saw.
        """
        ...


Stats = TypeVar("Stats", bound=type)
_kinds: list[Any] = []


def register_stats(kind: Stats) -> Stats:
    """Makes a NamedTuple of running statistics known to what works on states alone.

    Args:
        kind: A NamedTuple of arrays with fields `mean` and `var` and the methods of
            `RunningStats`. Flax modules recognise it by the names of its fields, and
            programs serialized by `jax.export` by its own.

    Returns:
        `kind`, so that this is a decorator.

    Raises:
        TypeError: It is no NamedTuple, or lacks a field or a method.

    Example:
        >>> from typing import NamedTuple
        >>> import jax, jaxbn
        >>> @jaxbn.register_stats
        ... class PowerStats(NamedTuple):
        ...     mean: jax.Array
        ...     var: jax.Array
        ...     power: jax.Array
        ...
        ...     def renewed(self, mean, var):
        ...         return PowerStats(mean, var, mean**2 + var)
        ...
        ...     def pooled(self, pool):
        ...         return self.renewed(*pool(self.mean, self.var))
    """
    wanted = {
        "mean": "mean: jax.Array",
        "var": "var: jax.Array",
        "renewed": "def renewed(self, mean: Array, var: Array) -> Self",
        "pooled": "def pooled(self, pool: Callable[[Array, Array], Pair]) -> Self",
    }
    fields = getattr(kind, "_fields", None)
    for name, line in wanted.items():
        if fields is None or not hasattr(kind, name):
            raise TypeError(
                f"running statistics must be a NamedTuple with {', '.join(wanted)}, but "
                f"{kind!r} lacks {name}. Write: {line}"
            )
    # Most fields first, so that a kind is never mistaken for one that holds a part of it.
    _kinds.append(exported(kind))
    _kinds.sort(key=lambda known: len(known._field_defaults) - len(known._fields))
    return kind


def is_stats(value: object) -> bool:
    """Tells whether a node of a pytree holds running statistics of a registered kind."""
    return isinstance(value, tuple(_kinds))


def stats_of(leaves: Mapping[str, Any]) -> Any | None:
    """Returns the running statistics whose fields `leaves` holds, or None.

    A field with a default may be missing, as the weight of `BatchStats`.
    """
    for kind in _kinds:
        if set(kind._fields) - set(kind._field_defaults) <= set(leaves):
            return kind(**{name: leaves[name] for name in kind._fields if name in leaves})
    return None


@register_stats
class BatchStats(NamedTuple):
    """The running statistics, each of the shape of the features.

    Structure, shapes and dtypes never change from one step to the next, so the value
    can be carried by `jax.lax.scan`, averaged, checkpointed and donated.

    Example:
        >>> import jaxbn
        >>> _, state = jaxbn.BatchNorm().init(3)
        >>> state.mean.shape, state.var.shape, state.weight
        ((3,), (3,), None)

    Attributes:
        mean: Running mean, at least float32. Starts at 0.
        var: Running variance, real, at least float32. Starts at 1.
        weight: What the averages have seen so far, for each feature: the weight that the
            zeroth value has lost with `debias=True`, the number of batches with
            `momentum=None`. Otherwise None. A float, so that averaging the state over
            devices keeps its dtype.
    """

    mean: Array
    var: Array
    weight: Array | None = None

    def renewed(self, mean: Array, var: Array) -> "BatchStats":
        """Returns the state after a data set of these moments."""
        weight = self.weight
        # 1 is a debiased average that has forgotten its start, and a mean of one batch; a
        # mean of more batches keeps their number.
        return BatchStats(mean, var, None if weight is None else jnp.maximum(weight, 1))

    def pooled(self, pool: Callable[[Array, Array], Pair]) -> "BatchStats":
        """Returns the state of replicas pooled into one; `pool` pools moments."""
        weight = self.weight
        if weight is not None:
            weight, _ = pool(weight, jnp.zeros_like(weight))
        return BatchStats(*pool(self.mean, self.var), weight)


@register_stats
class RenormStats(NamedTuple):
    """The running statistics of batch renormalization, each of the shape of the features.

    Example:
        >>> import jaxbn
        >>> _, state = jaxbn.BatchRenorm().init(3)
        >>> state._fields
        ('mean', 'var', 'std', 'renorm_mean', 'renorm_std')

    Attributes:
        mean: Running mean, which inference uses. Starts at 0.
        var: The variance that inference uses: that of `std`. Starts at 1.
        std: Running standard deviation, sqrt(var + epsilon) of each batch averaged.
        renorm_mean: Running mean, which the correction in training is taken from.
        renorm_std: Running standard deviation, likewise.
    """

    mean: Array
    var: Array
    std: Array
    renorm_mean: Array
    renorm_std: Array

    def renewed(self, mean: Array, var: Array) -> "RenormStats":
        """Returns the state after a data set of these moments."""
        # The square of a tracked deviation is a variance plus the layer's epsilon.
        epsilon = jnp.maximum(jnp.square(self.std) - self.var, 0)
        std = jnp.sqrt(var + epsilon)
        return RenormStats(mean, var, std, jnp.copy(mean), jnp.copy(std))

    def pooled(self, pool: Callable[[Array, Array], Pair]) -> "RenormStats":
        """Returns the state of replicas pooled into one; `pool` pools moments."""
        # The squares of the tracked deviations are variances plus epsilon, and pool alike.
        _, square = pool(self.mean, jnp.square(self.std))
        renorm_mean, renorm_square = pool(self.renorm_mean, jnp.square(self.renorm_std))
        std, renorm_std = jnp.sqrt(square), jnp.sqrt(renorm_square)
        return RenormStats(*pool(self.mean, self.var), std, renorm_mean, renorm_std)


def draw(
    initializer: Initializer, key: Key | None, shape: Shape, dtype: DTypeLike
) -> Array:
    """Returns what `initializer` draws, or explains that it needs a key or a new shape."""
    try:
        array = jnp.asarray(initializer(key, shape, dtype), dtype)
    except (TypeError, ValueError) as error:
        if key is not None:
            raise
        raise TypeError(
            f"the initializer {initializer} failed without a key: {error}. If it draws "
            "random numbers, pass one: init(..., key=jax.random.key(0))."
        ) from error
    if array.shape != shape:
        raise ValueError(
            f"the initializer {initializer} returned shape {array.shape} where {shape} "
            "was asked for. Let it honour its shape argument."
        )
    return array
