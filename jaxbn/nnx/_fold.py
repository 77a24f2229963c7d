"""Folding in NNX models: norms leave the model, and their neighbours take their arrays."""

from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from jaxbn._flax.core_call import result_dtype, stats_dtype
from jaxbn._fold.affine import Affine, as_affine, refused
from jaxbn._fold.kernels import fold_beside
from jaxbn._fold.pairs import Pairs, Path, find_layers, ordered_pairs
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._modules.inputs import positive
from jaxbn._modules.leaves import feature_axes_of
from jaxbn._state import BatchNormParams, BatchStats
from jaxbn._typing import Array, DTypeLike
from jaxbn.nnx._norm import Norm, assign, trees_of

M = TypeVar("M", bound=nnx.Module)
_LINEAR = nnx.Linear, nnx.Conv, nnx.ConvTranspose


class Folded(nnx.Module):
    """Where a norm was before `fold`: hands its input on, in the dtype of the norm."""

    def __init__(self, dtype: DTypeLike | None, *others: DTypeLike):
        self.dtype = dtype
        self.others = others

    def __call__(self, x: Array, use_running_average: Any = None, **options: Any) -> Array:
        """Returns `x`. Takes what a norm takes, as far as inference goes."""
        if use_running_average is False or options.get("residual") is not None:
            raise ValueError(
                "the norm here is folded into its neighbour: it neither trains nor adds a "
                "residual. Train the model from before fold; add the residual behind it."
            )
        others = (jnp.zeros((), dtype) for dtype in self.others)
        return x.astype(result_dtype(self.dtype, x, *others))


def fold(model: M, *, pairs: Pairs | None = None) -> M:
    """Returns a copy of a model for inference, with its norms folded into their neighbours.

    A norm is replaced by a module that hands its input on, and a `Linear`, `Conv` or
    `ConvTranspose` without a bias gets one. The norms may be those of jaxbn or Flax.

    Args:
        model: The trained model; it stays as it is.
        pairs: Pairs of paths with slashes, in the order of application: (linear, norm), or
            (norm, linear). Or "by name" for `jaxbn.find_pairs`, which must then know all
            norms; what it paired is shown by the logger "jaxbn".

    Returns:
        The folded model. `jaxbn.check_fold` proves it.

    Raises:
        ValueError: As `jaxbn.fold_tree` does, or the features of a norm do not lie on the
            last axis. The message names the layers.

    Example:
        >>> import jax.numpy as jnp, jaxbn.nnx
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(2, 3, use_bias=False, rngs=rngs),
        ...                        jaxbn.nnx.BatchNorm(3, rngs=rngs))
        >>> model.eval()
        >>> folded = jaxbn.nnx.fold(model, pairs=[("layers/0", "layers/1")])
        >>> jaxbn.check_fold(model, folded, jnp.ones((4, 2))) < 1e-6
        True
        >>> folded.layers[0].bias.shape
        (3,)
    """
    copy = nnx.clone(model)
    variables = nnx.to_pure_dict(nnx.state(copy))
    layers = find_layers(variables)
    for linear, norm, after in ordered_pairs(variables, layers, pairs):
        try:
            _fold_pair(copy, layers.linears[linear], layers.norms[norm], after)
        except (TypeError, ValueError) as error:
            raise ValueError(f"cannot fold {norm} and {linear}: {error}") from error
    return copy


def _fold_pair(model: nnx.Module, at_linear: Path, at_norm: Path, after: bool) -> None:
    layer, norm = _at(model, at_linear), _at(model, at_norm)
    if not isinstance(layer, _LINEAR):
        raise refused(
            f"the layer is a {type(layer).__name__}. Only Linear, Conv and ConvTranspose "
            "are known; use jaxbn.fold on its arrays."
        )
    kernel, mask = layer.kernel[...], getattr(layer, "mask", None)
    if mask is not None:
        kernel = kernel * jnp.asarray(mask, kernel.dtype)
    affine, folded = _affine(norm, kernel.ndim)
    flipped = getattr(layer, "transpose_kernel", False)
    kernel, bias = fold_beside(
        kernel,
        _value(layer.bias),
        affine,
        after=after,
        padding=getattr(layer, "padding", None),
        transposed=isinstance(layer, nnx.ConvTranspose),
        groups=getattr(layer, "feature_group_count", 1),
        **({"in_axis": -1, "out_axis": -2} if flipped else {}),
    )
    assign(layer.kernel, kernel)
    if layer.bias is None:
        layer.bias = nnx.Param(bias)
        layer.use_bias = True
    else:
        assign(layer.bias, bias.astype(layer.bias[...].dtype))
    _put(model, at_norm, folded)


def _affine(norm: Any, rank: int) -> tuple[Affine, Folded]:
    """Returns what a norm is in inference, and what takes its place."""
    if isinstance(norm, Norm):
        normalizer: Any = norm.normalizer
        params, state, _ = trees_of(norm)
        axes, folded = (
            feature_axes_of(normalizer),
            Folded(getattr(normalizer, "dtype", None)),
        )
    else:
        normalizer = BatchNorm(epsilon=positive(norm.epsilon))
        params = BatchNormParams(_value(norm.scale), _value(norm.bias))
        state = BatchStats(_value(norm.mean), _value(norm.var))
        axes, folded = norm.axis, Folded(norm.dtype, stats_dtype(norm.param_dtype))
    axes = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
    if axes not in ((-1,), (rank - 1,)):
        raise refused(
            f"the norm has axis={axes}, and the features of the layer lie on the last. "
            "Use jaxbn.fold on their arrays."
        )
    return as_affine(params, state, normalizer), folded


def _value(variable: Any) -> Any:
    return None if variable is None else variable[...]


def _at(model: Any, path: Path) -> Any:
    for key in path:
        model = getattr(model, key) if isinstance(key, str) else model[key]
    return model


def _put(model: Any, path: Path, module: nnx.Module) -> None:
    if not path:
        raise refused("the model is the norm alone. Use jaxbn.fold on its arrays.")
    parent = _at(model, path[:-1])
    if isinstance(path[-1], str):
        setattr(parent, path[-1], module)
    else:
        parent[path[-1]] = module
