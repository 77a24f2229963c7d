"""Any normalizer as an NNX module, and what the NNX layers share."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from jax.typing import ArrayLike

from jaxbn._accumulation.gather import Gather
from jaxbn._compat import set_value
from jaxbn._flax.core_call import as_training, check_mode
from jaxbn._flax.gathered_leaves import gathered_like, is_gathering, more_names
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.functions import InitApply
from jaxbn._layers.required import require
from jaxbn._modules.leaves import kinds_of, leaf_names, with_leaves
from jaxbn._typing import Array


class Switchable(nnx.Module):
    """A layer whose mode `nnx.view` sets, unless it is frozen."""

    use_running_average: bool | None
    frozen: bool = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode of the layer, for `nnx.view`.

        Args:
          use_running_average: Whether x is normalized with the running statistics; None
            to leave the mode as it is.
        """
        # `nnx.view_info` reads the text above, and knows an argument by two spaces.
        if use_running_average is not None:
            self.use_running_average = use_running_average


@in_our_words
class Norm(Switchable):
    """Any normalizer as an NNX module: renormalization, ghost batches, one of your own.

    The leaves of its params are `nnx.Param`, those of its state `nnx.BatchStat`, under
    the names of their fields.

    Example:
        >>> import jax.numpy as jnp, jaxbn, jaxbn.nnx
        >>> ghost = jaxbn.GhostBatchNorm(jaxbn.BatchNorm(), 2)
        >>> layer = jaxbn.nnx.Norm(ghost, 1)
        >>> print(layer(jnp.arange(4.0)[:, None]).round(3).ravel(), layer.scale[...])
        [-1.  1. -1.  1.] [1.]

    Args:
        normalizer: What normalizes; a value with `init` and `apply`.
        num_features: What `normalizer.init` takes: the size of the feature axis.
        use_running_average: As for `BatchNorm`.
        rngs: Accepted as by every layer of NNX; nothing random is drawn.
        **init_options: Keywords for `normalizer.init`, such as `scale_init`.

    Raises:
        ValueError: A leaf has a name that the module needs for itself.

    Differs from `BatchNorm` in the dtype of the result, which is what the normalizer
    makes it: x's, unless asked otherwise.
    """

    def __init__(
        self,
        normalizer: InitApply[Any, Any],
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        rngs: nnx.Rngs | None = None,
        **init_options: Any,
    ):
        check_mode(use_running_average)
        require("Norm", normalizer, "init")
        self.normalizer = normalizer
        self.num_features = num_features
        self.use_running_average = use_running_average
        trees = normalizer.init(num_features, **init_options)
        kinds = nnx.Param, nnx.BatchStat
        for names, tree, kind in zip(leaf_names(*trees), trees, kinds, strict=True):
            for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
                if hasattr(self, name):
                    raise ValueError(
                        f"the normalizer {normalizer} has a leaf called {name}, which the "
                        "module needs for itself. Give that field another name."
                    )
                setattr(self, name, kind(jnp.asarray(leaf)))

    @in_our_words
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | Array | None = None,
        *,
        update_stats: bool = True,
        **options: Any,
    ) -> Array:
        """Returns the normalized `x`, and updates the running statistics in training.

        Args:
            x: What the normalizer takes.
            use_running_average: As for `BatchNorm`.
            update_stats: As for `BatchNorm`.
            **options: Keywords of `normalizer.apply`, such as `weights`.

        Returns:
            An array of the shape of x.

        Raises:
            ValueError: use_running_average is given nowhere.
        """
        training = training_of(self, use_running_average)
        params, state, names = trees_of(self)
        more = gathering(self, names, update_stats)
        normalizer: Any = Gather(self.normalizer) if more else self.normalizer  # pyright: ignore
        state = gathered_like(state, [getattr(self, name)[...] for name in more])
        y, state = normalizer.apply(params, state, jnp.asarray(x), training, **options)
        if more or (training is not False and update_stats):
            for name, leaf in zip([*names, *more], jax.tree.leaves(state), strict=True):
                assign(getattr(self, name), leaf)
        return y


def trees_of(module: Norm) -> tuple[Any, Any, list[str]]:
    """Returns the params and the state of a layer, and the names of the state's leaves."""
    kinds = kinds_of(module.normalizer, module.num_features, {})
    names = leaf_names(*kinds)
    params, state = (
        with_leaves(kind, [getattr(module, name)[...] for name in group])
        for kind, group in zip(kinds, names, strict=True)
    )
    return params, state, names[1]


def training_of(module: Any, in_call: bool | Array | None) -> bool | Array:
    """Returns the mode of the call, or else that of the module; a frozen one infers."""
    if module.frozen:
        return False
    flag = module.use_running_average if in_call is None else in_call
    if flag is None:
        raise ValueError(
            "No `use_running_average` argument was provided, neither to the constructor "
            f"nor to the call. Write {type(module).__name__}(..., "
            "use_running_average=False) and switch with model.train() and model.eval(), "
            "or layer(x, use_running_average=not train)."
        )
    return as_training(flag)


def gathering(module: Any, names: Sequence[str], update_stats: bool) -> list[str]:
    """Returns what the layer has besides the statistics `names` while it gathers, or []."""
    gathers = update_stats and is_gathering(lambda name: hasattr(module, name))
    return more_names(names) if gathers else []


class CapturedError(errors.TraceContextError, ValueError):
    """A transformation of JAX was to change a module that it did not get."""

    def __init__(self, what: str):
        Exception.__init__(
            self,
            f"{what} must change what it keeps, but was captured by a function under jit, "
            "grad, vmap or the like, which got it from outside instead of as an argument. "
            "Pass the whole module: nnx.jit(lambda model, x: model(x))(model, x), with the "
            "transformation of flax.nnx; or leave the statistics as they are: call "
            "model.eval() before, or the layer with update_stats=False.",
        )


@contextlib.contextmanager
def told_if_captured(what: str) -> Iterator[None]:
    """Raises Flax's error about a module from outside of a trace with a remedy."""
    try:
        yield
    except (errors.TraceContextError, ValueError) as error:
        if "different trace level" not in str(error):
            raise
        raise CapturedError(what) from None


def assign(variable: Any, value: Array) -> None:
    """Sets a variable; where the dtype changed, the array is replaced, not written into."""
    with told_if_captured("a layer in training"):
        if value.dtype == variable[...].dtype:
            variable[...] = value
        else:
            set_value(variable, value)
