"""Statistics of NNX models gathered over batches: re-estimation and microbatches."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from jaxbn._accumulation.reestimate import reestimate as reestimate_states
from jaxbn._accumulation.state import gather as gather_states
from jaxbn._accumulation.state import track_gathered as track_states
from jaxbn._flax.gathered_leaves import as_node, as_state
from jaxbn.nnx._norm import assign

M = TypeVar("M", bound=nnx.Module)


def gather(model: M) -> M:
    """Lets the layers of a model pool the moments of all that they see next, in place.

    For gradients accumulated over microbatches: the statistics are those of the whole
    batch, tracked once. What is gathered are further `nnx.BatchStat` of the layers, so
    `nnx.jit`, `nnx.scan` and the like hand it on.

    Args:
        model: A module with layers of jaxbn.

    Returns:
        `model`, which is changed in place.

    Raises:
        ValueError: It has no statistics, or gathers already.

    Example:
        >>> import jax.numpy as jnp, jaxbn.nnx
        >>> from flax import nnx
        >>> model = jaxbn.nnx.BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
        >>> model = jaxbn.nnx.gather(model)
        >>> for x in (jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])):
        ...     y = model(x)
        ...
        >>> model = jaxbn.nnx.track_gathered(model)
        >>> print(model.mean[...], model.var[...])
        [3.] [5.]
    """
    layers = _layers(model)
    _write(layers, gather_states(_read(layers)))
    return model


def track_gathered(model: M) -> M:
    """Ends `gather`: the statistics are tracked once with all that each layer gathered.

    Args:
        model: What `gather` was called for, after the microbatches.

    Returns:
        `model`, with the variables that it had before.

    Raises:
        ValueError: The model does not gather.

    Example:
        >>> import jaxbn.nnx
        >>> from flax import nnx
        >>> model = jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> model = jaxbn.nnx.track_gathered(jaxbn.nnx.gather(model))
        >>> print(model.var[...])
        [1.]
    """
    layers = _layers(model)
    states = _read(layers)
    tracked = track_states(states)
    for name, layer in layers.items():
        for variable in set(as_node(states[name])) - set(as_node(tracked[name])):
            delattr(layer, variable)
    _write(layers, tracked)
    return model


def reestimate(
    model: M,
    batches: Iterable[Any],
    *,
    call: Callable[..., Any] | None = None,
    training: bool = True,
    passes: int = 1,
    ddof: int = 0,
    progress: bool = False,
    **kwargs: Any,
) -> M:
    """Gives every layer of a model the statistics of the whole data set, in place.

    `jaxbn.reestimate` tells what is computed, and what `passes` are for. Only statistics
    change. Call `model.eval()` before, so that dropout rests.

    Args:
        model: A module with layers of jaxbn.
        batches: An array for the model, or a tuple of its positional arguments, such as
            x and a mask, one after the other, of any sizes; may be sharded.
        call: `call(model, *args, **kwargs)`, the forward pass; None for
            `model(*args, **kwargs)`.
        training: Whether a layer normalizes each batch with the batch's own statistics,
            whatever mode it is in; False for those that it has.
        passes: As for `jaxbn.reestimate`.
        ddof: As for `jaxbn.reestimate`.
        progress: As for `jaxbn.reestimate`.
        **kwargs: Keywords of the call.

    Returns:
        `model`, which is changed in place.

    Raises:
        ImportError: progress=True without tqdm.
        ValueError: As `jaxbn.reestimate` does; the message names the layers, and the model
            is untouched.

    Example:
        >>> import jax.numpy as jnp, jaxbn.nnx
        >>> from flax import nnx
        >>> model = jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> batches = jnp.array([[-1.0], [1.0]]), jnp.array([[2.0], [4.0], [2.0], [4.0]])
        >>> model = jaxbn.nnx.reestimate(model, batches)
        >>> print(model.mean[...], model.var[...])
        [2.] [3.]
    """
    copy = nnx.clone(model)
    layers = _layers(copy)
    for layer in layers.values():
        layer.use_running_average = not training

    @nnx.jit
    def forward(copy: nnx.Module, args: tuple[Any, ...]) -> None:
        (type(copy).__call__ if call is None else call)(copy, *args, **kwargs)  # pyright: ignore

    def step(states: Any, batch: Any) -> Any:
        _write(layers, states)
        forward(copy, batch if isinstance(batch, tuple) else (batch,))
        return _read(layers)

    states = reestimate_states(
        step, _read(layers), batches, passes=passes, ddof=ddof, progress=progress
    )
    _write(_layers(model), states)
    return model


def _layers(model: nnx.Module) -> dict[str, Any]:
    """Returns the layers that track statistics and are not frozen, by their paths."""
    return {
        "/".join(map(str, path)) or type(node).__name__: node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        and not getattr(node, "frozen", False)
        and as_state(_stats(node)) is not None
    }


def _stats(module: nnx.Module) -> dict[str, Any]:
    return {
        name: variable
        for name, variable in vars(module).items()
        if isinstance(variable, nnx.BatchStat)
    }


def _read(layers: dict[str, Any]) -> dict[str, Any]:
    return {
        name: as_state({key: stat[...] for key, stat in _stats(layer).items()})
        for name, layer in layers.items()
    }


def _write(layers: dict[str, Any], states: dict[str, Any]) -> None:
    for name, layer in layers.items():
        for key, leaf in as_node(states[name]).items():
            if hasattr(layer, key):
                assign(getattr(layer, key), jnp.asarray(leaf))
            else:
                setattr(layer, key, nnx.BatchStat(leaf))
