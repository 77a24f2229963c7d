"""Training state for NNX: one module that holds all that a step changes."""

from typing import Any, Generic, TypeVar

import optax
from flax import errors, nnx

from jaxbn._flax.restore import fill
from jaxbn._typing import PyTree
from jaxbn.nnx._norm import CapturedError

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
        try:
            self.optimizer.update(self.model, grads)
        except (errors.TraceContextError, ValueError) as error:
            if "different trace level" not in str(error):
                raise
            raise CapturedError("a TrainState") from None


def restore(module: T, saved: PyTree) -> T:
    """Puts the arrays of `saved`, which a checkpoint gave back, into `module`.

    Reading and writing is Orbax's; this makes sure that what was read is a checkpoint of
    this module before anything is changed.

    Args:
        module: A `TrainState` or any other module, also an abstract one from
            `nnx.eval_shape`.
        saved: What Orbax read of `nnx.state(module)` or of its `nnx.to_pure_dict`, or an
            `nnx.State`.

    Returns:
        `module`, which is updated in place and keeps its dtypes and shardings.

    Raises:
        ValueError: A leaf is missing, is one too many, or has another shape; the message
            names it, and both shapes. The module is untouched then.

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
    if isinstance(saved, nnx.State):
        saved = nnx.to_pure_dict(saved)
    filled = fill(nnx.to_pure_dict(state), saved)
    nnx.replace_by_pure_dict(state, filled)
    nnx.update(module, state)
    return module
