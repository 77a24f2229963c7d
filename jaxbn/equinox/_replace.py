"""Puts our layers in the place of Equinox's batch norms, with what they have tracked."""

from typing import Any

import equinox as eqx
import jax
import numpy as np

from jaxbn._typing import PyTree
from jaxbn.convert._equinox import from_equinox
from jaxbn.convert._equinox_arrays import Variance
from jaxbn.equinox._batch_norm import BatchNorm, state_index_of
from jaxbn.equinox._state import split


def replace(
    model: PyTree, state: eqx.nn.State, *, variance: Variance = "intended"
) -> tuple[PyTree, eqx.nn.State]:
    """Returns a model and its state with a `BatchNorm` for every `eqx.nn.BatchNorm`.

    For a model that was trained with Equinox's layer, or was loaded with
    `eqx.tree_deserialise_leaves` into one that has it. Training goes on where it stood.

    Args:
        model: Any pytree with layers of Equinox, not an ensemble of them.
        state: Its state.
        variance: With `mode="batch"`, "intended" for the average variance of the batches;
            "used" for the one that Equinox normalizes with, which is larger in the first
            hundreds of steps, so that inference is the same to the last digits.

    Returns:
        `(model, state)`; those passed in are as they were.

    Raises:
        ValueError: There is no batch norm of Equinox in the model; one holds what is no
            statistic, as `jaxbn.convert.from_equinox` tells.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jaxbn.equinox
        >>> theirs = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, "batch", mode="batch")
        >>> train = jax.vmap(
        ...     theirs[0], axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        ... )
        >>> y, state = train(jnp.array([[1.0], [3.0]]), theirs[1])
        >>> layer, state = jaxbn.equinox.replace(theirs[0], state)
        >>> print(*(array.round(3) for array in state.get(layer.batch_state_index)))
        [2.] [1.]
    """
    nodes, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_replaced)
    if not any(isinstance(node, eqx.nn.BatchNorm) for _, node in nodes):
        raise ValueError(
            f"there is no eqx.nn.BatchNorm in the {type(model).__name__}. Pass a model "
            "that has some, and its state."
        )
    # Every layer gets what it holds as its start, from which a new state is then made.
    renewed = [
        _with_start(jax.tree_util.keystr(path), node, state, variance)
        if _is_replaced(node)
        else node
        for path, node in nodes
    ]
    return eqx.nn.make_with_state(jax.tree.unflatten)(structure, renewed)


def _is_replaced(node: Any) -> bool:
    return isinstance(node, (eqx.nn.BatchNorm, eqx.nn.StateIndex))


def _with_start(path: str, node: Any, state: eqx.nn.State, variance: Variance) -> Any:
    if isinstance(node, eqx.nn.StateIndex):
        return eqx.nn.StateIndex(state.get(node))
    path = f"model{path}"
    arrays = {f"{path}.{name}": np.asarray(a) for name, a in _arrays(node, state).items()}
    options: Any = {"momentum": node.momentum, "eps": node.eps, "variance": variance}
    read = from_equinox(arrays, path, **options)
    layer = BatchNorm(
        node.input_size,
        node.axis_name,
        node.eps,
        node.channelwise_affine,
        node.momentum,
        node.inference,
        read.params.scale.dtype if read.params.scale is not None else None,
        node.mode,
    )
    entry, seen = split(read.state)
    return eqx.tree_at(
        lambda it: (it.weight, it.bias, state_index_of(it), it.seen_index),
        layer,
        (*read.params, eqx.nn.StateIndex(entry), eqx.nn.StateIndex(seen)),
        is_leaf=lambda leaf: leaf is None,
    )


def _arrays(node: eqx.nn.BatchNorm, state: eqx.nn.State) -> dict[str, Any]:
    """Returns the arrays of a layer of Equinox, as `from_equinox` names them."""
    arrays: dict[str, Any] = {"weight": node.weight, "bias": node.bias}
    if node.mode == "batch":
        assert node.batch_state_index is not None
        assert node.batch_counter is not None
        mean, var = state.get(node.batch_state_index)
        counter = state.get(node.batch_counter)
        arrays |= {"hidden_mean": mean, "hidden_var": var, "counter": counter}
    else:
        assert node.ema_state_index is not None
        assert node.ema_first_time_index is not None
        mean, var = state.get(node.ema_state_index)
        first_time = state.get(node.ema_first_time_index)
        arrays |= {"running_mean": mean, "running_var": var, "first_time": first_time}
    return {name: array for name, array in arrays.items() if array is not None}
