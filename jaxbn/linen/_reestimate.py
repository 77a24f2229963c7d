"""Statistics of linen models gathered over batches: re-estimation and microbatches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxbn._accumulation.reestimate import reestimate as reestimate_states
from jaxbn._accumulation.state import gather as gather_states
from jaxbn._accumulation.state import is_state
from jaxbn._accumulation.state import track_gathered as track_states
from jaxbn._flax.gathered_leaves import as_node, as_state
from jaxbn._typing import PyTree


def gather(batch_stats: PyTree) -> PyTree:
    """Returns statistics that gather: layers pool the moments of all that they see next.

    For gradients accumulated over microbatches: the statistics are those of the whole
    batch, tracked once. They stay right within `nn.scan`, `nn.vmap` and `nn.remat`, since
    the layers keep what they gather in the collection "batch_stats".

    Args:
        batch_stats: The collection of that name, of a model with layers of jaxbn.

    Returns:
        The collection with some more leaves in every layer, for `lax.scan` to carry.

    Raises:
        ValueError: There are no statistics, or they gather already.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn.linen
        >>> model = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.0)
        >>> microbatches = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]])
        >>> variables = model.init(jax.random.key(0), microbatches[0])
        >>> params = variables["params"]
        >>> def step(batch_stats, x):
        ...     variables = {"params": params, "batch_stats": batch_stats}
        ...     y, updates = model.apply(variables, x, mutable=["batch_stats"])
        ...     return updates["batch_stats"], y.mean()
        ...
        >>> batch_stats = jaxbn.linen.gather(variables["batch_stats"])
        >>> batch_stats, _ = jax.lax.scan(step, batch_stats, microbatches)
        >>> batch_stats = jaxbn.linen.track_gathered(batch_stats)
        >>> print(batch_stats["mean"], batch_stats["var"])
        [3.] [5.]
    """
    return _as_collection(gather_states(_as_states(batch_stats)))


def track_gathered(batch_stats: PyTree) -> PyTree:
    """Returns the statistics after one update with all that each layer has gathered.

    Args:
        batch_stats: What `gather` returned, after the microbatches.

    Returns:
        The collection as it was before `gather`, tracked once with the momentum of each
        layer.

    Raises:
        ValueError: These statistics do not gather.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn.linen
        >>> model = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> gathered = jaxbn.linen.gather(variables["batch_stats"])
        >>> print(jaxbn.linen.track_gathered(gathered))
        {'mean': Array([0., 0.], dtype=float32), 'var': Array([1., 1.], dtype=float32)}
    """
    return _as_collection(track_states(_as_states(batch_stats)))


def reestimate(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, PyTree],
    batches: Iterable[Any],
    *,
    passes: int = 1,
    ddof: int = 0,
    progress: bool = False,
    **kwargs: Any,
) -> PyTree:
    """Returns batch_stats with the statistics of the whole data set, for every layer.

    `jaxbn.reestimate` tells what is computed, and what `passes` are for. The model decides
    by its own keywords, such as `train`, whether a layer normalizes each batch with the
    batch's statistics or with those that it has.

    Args:
        apply_fn: Usually `model.apply`. Under `shard_map`, a function of the same
            arguments, whose layers have `axis_name`.
        variables: Params, batch_stats and what else the model needs.
        batches: An array for the model, or a tuple of its positional arguments, such as
            x and a mask, one after the other, of any sizes; may be sharded.
        passes: As for `jaxbn.reestimate`.
        ddof: As for `jaxbn.reestimate`.
        progress: As for `jaxbn.reestimate`.
        **kwargs: Keywords of `apply_fn`, such as train=True, or rngs for dropout.

    Returns:
        A collection batch_stats like that of `variables`, which are left as they were.

    Raises:
        ImportError: progress=True without tqdm.
        ValueError: As `jaxbn.reestimate` does; the message names the layers.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn.linen
        >>> model = jaxbn.linen.BatchNorm()
        >>> batches = jnp.array([[-1.0], [1.0]]), jnp.array([[2.0], [4.0], [2.0], [4.0]])
        >>> variables = model.init(
        ...     jax.random.key(0), batches[0], use_running_average=True
        ... )
        >>> batch_stats = jaxbn.linen.reestimate(
        ...     model.apply, variables, batches, use_running_average=False
        ... )
        >>> print(batch_stats["mean"], batch_stats["var"])
        [2.] [3.]
    """
    others = {name: tree for name, tree in variables.items() if name != "batch_stats"}

    @jax.jit
    def forward(states: PyTree, others: PyTree, args: tuple[Any, ...]) -> PyTree:
        variables = {**others, "batch_stats": _as_collection(states)}
        _, updates = apply_fn(variables, *args, mutable=["batch_stats"], **kwargs)
        return _as_states(updates["batch_stats"])

    def step(states: PyTree, batch: Any) -> PyTree:
        return forward(states, others, batch if isinstance(batch, tuple) else (batch,))

    states = reestimate_states(
        step,
        _as_states(variables.get("batch_stats", {})),
        batches,
        passes=passes,
        ddof=ddof,
        progress=progress,
    )
    return _as_collection(states)


def _as_states(tree: PyTree) -> PyTree:
    """Returns the nested dict with the state of a norm in place of its leaves."""
    if not isinstance(tree, Mapping):
        return tree
    state = as_state(tree)
    if state is not None:
        return state
    return {name: _as_states(part) for name, part in tree.items()}


def _as_collection(states: PyTree) -> PyTree:
    """Undoes `_as_states`."""
    return jax.tree.map(
        lambda state: as_node(state) if is_state(state) else state,
        states,
        is_leaf=is_state,
    )
