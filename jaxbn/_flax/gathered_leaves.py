"""How a Flax layer keeps a state that gathers: under further names, beside its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxbn._accumulation.state import Gathered
from jaxbn._dtypes import widened
from jaxbn._state import stats_of
from jaxbn._statistics.moments import Moments
from jaxbn._typing import PyTree

_POOLED = [f"gathered_{field}" for field in Moments._fields]


def more_names(names: Sequence[str]) -> list[str]:
    """Returns the further names of a layer whose statistics are called `names`."""
    return [*(f"start_{name}" for name in names), *_POOLED]


def is_gathering(has: Callable[[str], bool]) -> bool:
    """Tells whether a layer gathers, given what tells whether it has a name."""
    return has(_POOLED[-1])


def gathered_like(state: PyTree, more: Sequence[Any]) -> PyTree:
    """Returns `state`, as a `Gathered` with the leaves `more` if there are any, widened.

    A running average in half precision stalls: its steps are below its last digit.
    """
    if not more:
        return widened(state)
    like: Any = Gathered(state, state, Moments(0, 0, 0))  # pyright: ignore[reportArgumentType]
    every = [*jax.tree.leaves(state), *more]
    return widened(jax.tree.unflatten(jax.tree.structure(like), every))


def as_state(node: Mapping[str, Any]) -> Any | None:
    """Returns the state of the layer with the leaves of `node`; None if it is no norm's."""
    state = stats_of(node)
    if state is None or not is_gathering(node.__contains__):
        return state
    names = [name for name, leaf in state._asdict().items() if leaf is not None]
    return gathered_like(state, [node[name] for name in more_names(names)])


def as_node(state: Any) -> dict[str, Any]:
    """Returns the leaves of a state by their names, undoing `as_state`."""
    gathers = isinstance(state, Gathered)
    fields = (state.stats if gathers else state)._asdict()
    names = [name for name, leaf in fields.items() if leaf is not None]
    every = [*names, *(more_names(names) if gathers else ())]
    return dict(zip(every, jax.tree.leaves(state), strict=True))
