"""Training state for linen that cannot lose the statistics of its layers."""

from typing import Any, Literal, TypeVar, overload

import jax
from flax import core, serialization
from flax.core.scope import union_filters
from flax.training import train_state

from jaxbn._flax.restore import Left, fill, read
from jaxbn._typing import PyTree

T = TypeVar("T")


class TrainState(train_state.TrainState):
    """Flax's TrainState with `batch_stats`, which every step must hand over.

    `apply` returns the statistics after the batch along with the output, and
    `apply_gradients` asks for them: to drop them is an error that Python and type
    checkers tell, never a model that evaluates with the statistics of its first day.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen, optax
        >>> model = nn.Sequential([nn.Dense(3), jaxbn.linen.BatchNorm(False)])
        >>> x = jnp.ones((8, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> state = jaxbn.linen.TrainState.create(
        ...     apply_fn=model.apply, tx=optax.sgd(0.1), **variables
        ... )
        >>> @jax.jit
        ... def train_step(state, x):
        ...     def loss_fn(params):
        ...         y, batch_stats = state.apply(params, x)
        ...         return jnp.square(y - 1).mean(), batch_stats
        ...     grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        ...     (loss, batch_stats), grads = grad_fn(state.params)
        ...     return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss
        ...
        >>> state, loss = train_step(state, x)
        >>> int(state.step), float(loss)
        (1, 1.0)

    Attributes:
        batch_stats: The collection of that name: the running statistics of all layers.
        step: As in Flax's TrainState, like the fields below.
        apply_fn: Usually `model.apply`.
        params: What is trained.
        tx: The Optax optimizer.
        opt_state: Its state.

    Differs from Flax's TrainState, whose `apply_gradients` keeps the old statistics
    when they are not mentioned.
    """

    batch_stats: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """Returns what evaluates: `state.apply_fn(state.variables, x)`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def apply(
        self, params: PyTree, *args: Any, mutable: Any = False, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        """Returns the output of the model in training, and the statistics after it.

        Args:
            params: The params to differentiate with respect to.
            *args: The inputs of the model.
            mutable: Further collections that the model may write, such as ["losses"].
            **kwargs: Its keywords, and those of `apply_fn`, such as `rngs`.

        Returns:
            `(output, batch_stats)`; with `mutable`, `(output, collections)`, a dict of
            batch_stats and the others, as Flax returns it.
        """
        variables = {"params": params, "batch_stats": self.batch_stats}
        names = union_filters(["batch_stats"], mutable)
        output, updated = self.apply_fn(variables, *args, mutable=names, **kwargs)
        updated = {"batch_stats": self.batch_stats, **updated}
        return output, updated if mutable else updated["batch_stats"]

    def apply_gradients(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, grads: PyTree, batch_stats: PyTree, **fields: Any
    ) -> "TrainState":
        """Returns the state after a step of the optimizer.

        Args:
            grads: The gradients, of the structure of `params`.
            batch_stats: The statistics that `apply` returned in this step.
            **fields: Further fields to replace.

        Returns:
            A `TrainState`, one step on.

        Raises:
            TypeError: batch_stats is missing.
            ValueError: batch_stats is not like the collection of this state.
        """
        old, new = (
            jax.tree_util.tree_map(jax.numpy.shape, core.unfreeze(tree))
            for tree in (self.batch_stats, batch_stats)
        )
        if old != new:
            raise ValueError(
                f"batch_stats has the leaves {new} but the state has {old}. Pass what "
                "state.apply(params, ...) returned second, or updates['batch_stats']."
            )
        return super().apply_gradients(grads=grads, batch_stats=batch_stats, **fields)


@overload
def restore(target: T, saved: PyTree, *, strict: Literal[True] = True) -> T: ...
@overload
def restore(target: T, saved: PyTree, *, strict: Literal[False]) -> tuple[T, Left]: ...
def restore(target: T, saved: PyTree, *, strict: bool = True) -> T | tuple[T, Left]:
    """Returns `target` with the arrays of `saved`, which a checkpoint gave back.

    Reading and writing is Orbax's; this makes sure that what was read is a checkpoint of
    this model before anything is used.

    Args:
        target: What was saved, in memory: variables, a `TrainState`, any pytree that
            `flax.serialization` knows, also an abstract one from `jax.eval_shape`.
        saved: The tree that was saved, its `flax.serialization.to_state_dict`, or the
            bytes of `flax.serialization.to_bytes`.
        strict: False to restore what fits, as for a model with another head.

    Returns:
        A tree of the structure, the dtypes and the shardings of `target`, which is left as
        it was; `batch_stats` are widened to float32 where it holds less, in which running
        averages stall. With `strict=False`, `(tree, left)`: `left.kept` names the leaves
        of `target` that stayed as they were, `left.unused` those of `saved` without use.

    Raises:
        TypeError: saved is no tree.
        ValueError: A leaf is missing, is one too many, or has another shape; the message
            names it, and both shapes. Or its values do not fit the dtype of the target:
            a float too large, a fraction for an integer, a complex number for a real one.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn.linen
        >>> layer = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> mine = layer.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> other = layer.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> jaxbn.linen.restore(mine, other)
        Traceback (most recent call last):
        ...
        ValueError: the checkpoint is of another model: batch_stats/mean has shape (3,) in
        the checkpoint and (2,) in the model; ...
    """
    filled, left = fill(
        serialization.to_state_dict(target),
        serialization.to_state_dict(read(saved)),
        strict=strict,
        is_statistic=lambda path: "batch_stats" in path,
    )
    restored: Any = serialization.from_state_dict(target, filled)
    return restored if strict else (restored, left)
