"""Training state for NNX: one module that holds all that a step changes."""

from typing import Any, Generic, Literal, TypeVar, overload

import optax
from flax import nnx

from jaxbn._flax.restore import Left, fill, read
from jaxbn._typing import PyTree
from jaxbn.nnx._norm import told_if_captured

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T", bound=nnx.Module)


class TrainState(nnx.Module, Generic[M]):
    """A model and its optimizer as one module.

    In NNX a layer updates its statistics in place, and `nnx.jit` hands all changes of a
    module that it is given back to the caller. What remains to be forgotten is a part of
    the whole, in a step or in a checkpoint, so the whole is one module: pass it to the
    step, and save `nnx.state` of it.

    Example:
        >>> import jax.numpy as jnp, jaxbn.nnx, optax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs),
        ...                        jaxbn.nnx.BatchNorm(3, rngs=rngs))
        >>> state = jaxbn.nnx.TrainState(model, optax.sgd(0.1))
        >>> @nnx.jit
        ... def train_step(state, x):
        ...     def loss_fn(model):
        ...         return jnp.square(model(x) - 1).mean()
        ...     loss, grads = nnx.value_and_grad(loss_fn)(state.model)
        ...     state.apply_gradients(grads)
        ...     return loss
        ...
        >>> float(train_step(state, jnp.ones((8, 2)))), int(state.optimizer.step[...])
        (1.0, 1)

    Attributes:
        model: The module that is trained.
        optimizer: The `nnx.Optimizer` of its params.

    Args:
        model: The module to train.
        tx: An Optax optimizer.
        wrt: The filter of the variables that are trained.
    """

    def __init__(self, model: M, tx: optax.GradientTransformation, *, wrt: Any = nnx.Param):
        self.model = model
        self.optimizer: nnx.Optimizer[M] = nnx.Optimizer(model, tx, wrt=wrt)

    def apply_gradients(self, grads: PyTree) -> None:
        """Updates the params of the model, and the optimizer, in place.

        Args:
            grads: What `nnx.grad` returned for `model`.
        """
        with told_if_captured("a TrainState"):
            self.optimizer.update(self.model, grads)


@overload
def restore(module: T, saved: PyTree, *, strict: Literal[True] = True) -> T: ...
@overload
def restore(module: T, saved: PyTree, *, strict: Literal[False]) -> tuple[T, Left]: ...
def restore(module: T, saved: PyTree, *, strict: bool = True) -> T | tuple[T, Left]:
    """Puts the arrays of `saved`, which a checkpoint gave back, into `module`.

    Reading and writing is Orbax's; this makes sure that what was read is a checkpoint of
    this module before anything is changed.

    Args:
        module: A `TrainState` or any other module, also an abstract one from
            `nnx.eval_shape`.
        saved: What Orbax read of `nnx.state(module)` or of its `nnx.to_pure_dict`, an
            `nnx.State`, or the bytes of `flax.serialization.to_bytes` of the latter.
        strict: False to restore what fits, as for a model with another head.

    Returns:
        `module`, which is updated in place and keeps its dtypes and shardings; an
        `nnx.BatchStat` is widened to float32 where it holds less, in which running
        averages stall. With `strict=False`, `(module, left)`: `left.kept` names the
        leaves of `module` that stayed as they were, `left.unused` those of `saved`
        without use.

    Raises:
        TypeError: saved is no tree.
        ValueError: A leaf is missing, is one too many, or has another shape; the message
            names it, and both shapes. Or its values do not fit the dtype of the module:
            a float too large, a fraction for an integer, a complex number for a real one.
            The module is untouched then.

    Example:
        >>> import jaxbn.nnx
        >>> from flax import nnx
        >>> mine, other = (jaxbn.nnx.BatchNorm(n, rngs=nnx.Rngs(0)) for n in (2, 3))
        >>> jaxbn.nnx.restore(mine, nnx.state(other))
        Traceback (most recent call last):
        ...
        ValueError: the checkpoint is of another model: bias has shape (3,) in the
        checkpoint and (2,) in the model; ...
    """
    state = nnx.state(module)
    saved = read(saved)
    if isinstance(saved, nnx.State):
        saved = nnx.to_pure_dict(saved)
    statistics = {
        path for path, leaf in nnx.to_flat_state(state) if isinstance(leaf, nnx.BatchStat)
    }
    filled, left = fill(
        nnx.to_pure_dict(state),
        saved,
        strict=strict,
        is_statistic=statistics.__contains__,
    )
    nnx.replace_by_pure_dict(state, filled)
    with told_if_captured("a module to restore"):
        nnx.update(module, state)
    return module if strict else (module, left)
