"""The two verbs of the library as free functions, for any normalizer."""

from typing import Any, Protocol

from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.normalizer import Params, State
from jaxbn._typing import Array, ArrayLike

_DEFAULT = BatchNorm()


class InitApply(Protocol[Params, State]):
    """What the free functions and the modules need: a value with `init` and `apply`."""

    def init(
        self, num_features: int | tuple[int, ...], *_: Any, **options: Any
    ) -> tuple[Params, State]:
        """Returns `(params, state)` for inputs with `num_features` features."""
        ...

    def apply(
        self,
        params: Params,
        state: State,
        x: ArrayLike,
        training: bool | Array,
        *_: Any,
        **options: Any,
    ) -> tuple[Array, State]:
        """Returns the normalized `x` and the state after it."""
        ...


@in_our_words
def init(
    num_features: int | tuple[int, ...],
    normalizer: InitApply[Params, State] = _DEFAULT,
    **options: Any,
) -> tuple[Params, State]:
    """Returns the params and the state of `normalizer` before training.

    Args:
        num_features: The size of the feature axis; with several, a tuple of their sizes.
        normalizer: What normalizes.
        **options: Further keywords of `normalizer.init`, such as initializers.

    Returns:
        `(params, state)`, two pytrees of arrays.

    Raises:
        TypeError, ValueError: As `normalizer.init` does.

    Example:
        >>> import jaxbn
        >>> params, state = jaxbn.init(64)
        >>> params.scale.shape, state.mean.shape
        ((64,), (64,))
    """
    return normalizer.init(num_features, **options)


@in_our_words
def apply(
    params: Params,
    state: State,
    x: ArrayLike,
    training: bool | Array,
    normalizer: InitApply[Params, State] = _DEFAULT,
    **options: Any,
) -> tuple[Array, State]:
    """Returns the normalized `x` and the state after it.

    Args:
        params: As `init` returned them, or trained since.
        state: As `init` or the last call returned it.
        x: Floating or complex, of rank 2 or more.
        training: Whether to normalize with the statistics of the batch and track them; a
            Python bool or a boolean scalar, which may be traced.
        normalizer: The one that params and state belong to.
        **options: Further keywords of `normalizer.apply`, such as `weights`.

    Returns:
        `(y, state)`: an array of the shape of x, and a state like the one passed in.

    Raises:
        TypeError, ValueError: As `normalizer.apply` does.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> params, state = jaxbn.init(1)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> y, state = jaxbn.apply(params, state, x, True)
        >>> print(y.round(3).ravel())
        [-1.  1.]
    """
    return normalizer.apply(params, state, x, training, **options)
