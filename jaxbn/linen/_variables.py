"""What the linen layers share: their mode, and the statistics among their variables."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
from flax import errors

from jaxbn._flax.core_call import as_training, axis_remedy
from jaxbn._flax.gathered_leaves import is_gathering, more_names
from jaxbn._typing import Array, Shape


class MissingStatsError(errors.ScopeCollectionNotFound, ValueError):
    """The statistics of a layer were not among the variables."""

    def __init__(self, path: str):
        Exception.__init__(
            self,
            f"the layer at /{path} found no statistics: the variables hold no batch_stats "
            "for it. Pass both collections that init returned: "
            "model.apply({'params': params, 'batch_stats': batch_stats}, x).",
        )


class FrozenStatsError(errors.ModifyScopeVariableError, ValueError):
    """A layer in training was not allowed to update its statistics."""

    def __init__(self, path: str):
        Exception.__init__(
            self,
            f"the layer at /{path} is training, but its batch_stats are not mutable. "
            "Write y, updates = model.apply(variables, x, mutable=['batch_stats']) and "
            "keep updates['batch_stats']; or call the layer with update_stats=False, or "
            "with use_running_average=True.",
        )


class FeaturesError(errors.ScopeParamShapeError, ValueError):
    """The features of x are not those that a layer was made for."""

    def __init__(self, path: str, got: Shape, want: Shape, shape: Shape):
        Exception.__init__(
            self,
            f"the layer at /{path} was made for {got} features, got {want} in x of shape "
            f"{shape}. Make variables for x with init, or "
            f"{axis_remedy(got, want, shape)}.",
        )


# These are functions, since linen lists the methods of a module in its summaries.


def training_of(
    module: nn.Module, in_field: bool | None, in_call: bool | Array | None
) -> bool | Array:
    """Returns the mode that the constructor or the call gives, of which just one may."""
    if (in_field is None) == (in_call is None):
        where = "neither" if in_field is None else "both"
        raise ValueError(
            "use_running_average must be passed to the constructor or at call time, just "
            f"once, got {where}. Write {type(module).__name__}()(x, "
            "use_running_average=not train), or fix it in the constructor alone."
        )
    flag = in_field if in_call is None else in_call
    assert flag is not None
    return as_training(flag)


def statistic(module: nn.Module, name: str, make: Callable[[], Array]) -> nn.Variable:
    """Returns a variable of the collection batch_stats, made first where that is due."""
    known = module.has_variable("batch_stats", name)
    if not known and not module.is_mutable_collection("batch_stats"):
        raise MissingStatsError("/".join(module.path))
    return module.variable("batch_stats", name, make)


def tracks(module: nn.Module, training: bool | Array, update_stats: bool) -> bool:
    """Tells whether this call changes the statistics, and makes sure that it can."""
    if training is False or not update_stats or module.is_initializing():
        return False
    if not module.is_mutable_collection("batch_stats"):
        raise FrozenStatsError("/".join(module.path))
    return True


def gathering(
    module: nn.Module, names: Sequence[str], update_stats: bool
) -> list[nn.Variable]:
    """Returns what the layer has besides the statistics `names` while it gathers, or []."""
    has = functools.partial(module.has_variable, "batch_stats")
    mutable = module.is_mutable_collection("batch_stats") and not module.is_initializing()
    if not (update_stats and mutable and is_gathering(has)):
        return []
    return [module.variable("batch_stats", name) for name in more_names(names)]
