"""Linen models that others wrote: their norms run on jaxbn, with the settings wanted."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from jaxbn._flax.changed import (
    Changed,
    NormChange,
    check_settings_known,
    fits,
    nothing_found,
    shown,
)
from jaxbn.linen._batch_norm import BatchNorm, call_in_linen

_FIELDS = [
    f.name for f in dataclasses.fields(BatchNorm) if f.name not in ("parent", "name")
]


@contextlib.contextmanager
def replaced(only: str | None = None, **changes: Any) -> Iterator[Changed]:
    """Lets the norms of a model run on jaxbn while the context lasts.

    The model is not touched: its layers `flax.linen.BatchNorm` keep their names, their
    variables and their place in the optimizer, and compute as `jaxbn.linen.BatchNorm`. With
    `changes`, they compute with other settings: synchronised over devices, with another
    momentum, or frozen, by use_running_average=True, whatever the model asks them for.

    JAX compiles what it has traced: write the context inside of the function that is
    jitted, around `model.apply` or `model.init`.

    Args:
        only: A pattern of the paths of the norms that are meant, such as `"encoder/*"`;
            None for all. The others stay what they are, unless a context inside of this
            one means them.
        **changes: `momentum`, `epsilon`, `dtype`, `axis_name`, `axis_index_groups`, or
            `use_running_average`, which then counts for the call, too.

    Yields:
        The norms that ran so far, as a list that prints: where each is, what it was, and
        what it computed as.

    Raises:
        TypeError: A change is no such setting.
        ValueError: No norm ran that is meant.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
        >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(False)])
        >>> variables = model.init(jax.random.key(0), jnp.ones((8, 2)))
        >>> with jaxbn.linen.replaced(use_running_average=True) as norms:
        ...     y = model.apply(variables, jnp.ones((8, 2)))         # nothing is mutable
        ...
        >>> norms
        layers_1: flax.BatchNorm(momentum=0.99, epsilon=1e-05) ->
        jaxbn.BatchNorm(momentum=0.99, epsilon=1e-05, use_running_average=True)
    """
    check_settings_known("replaced", changes, "use_running_average")
    norms, others = Changed(), []

    def intercept(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        own = type(module) in (nn.BatchNorm, BatchNorm)
        if not own or context.method_name != "__call__":
            return run(*args, **kwargs)
        path = "/".join(module.path)
        if only is not None and not fits(only, path):
            others.append(path)
            return run(*args, **kwargs)
        fields = {name: getattr(module, name) for name in _FIELDS}
        settings = BatchNorm(**{**fields, **changes}, parent=None)
        mode = changes.get("use_running_average")
        if mode is not None:
            args, kwargs = args[:1], {**kwargs, "use_running_average": None}
        now = shown(settings)
        if mode is not None:
            now = f"{now[:-1]}, use_running_average={mode})"
        change = NormChange(path, shown(module), now)
        if change not in norms:
            norms.append(change)
        return call_in_linen(module, settings, *args, **kwargs)

    with nn.intercept_methods(intercept):
        yield norms
    if not norms and others:
        raise nothing_found(others, only)
    if not norms:
        raise ValueError(
            "no norm ran in this context. Call the model in it: inside of a function that "
            "is jitted, since what JAX has compiled before stays what it is."
        )
