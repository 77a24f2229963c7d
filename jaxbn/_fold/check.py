"""The proof that a folded model is the model that it was made of."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxbn._typing import PyTree


def check_fold(
    apply_before: Callable[..., PyTree],
    apply_after: Callable[..., PyTree],
    *inputs: Any,
    tolerance: float = 1e-4,
) -> float:
    """Returns how far two models lie apart on a batch, or raises if that is too far.

    Args:
        apply_before: The model in inference, a function of `inputs`.
        apply_after: The folded model, likewise; the outputs are any pytrees of arrays.
        *inputs: A batch, of real data rather than noise.
        tolerance: The largest difference that is allowed, relative to the largest value of
            an output. Folding in float32 costs some 1e-6 for each layer.

    Returns:
        The largest relative difference.

    Raises:
        ValueError: It exceeds the tolerance or is not finite; the message says where. Or
            the outputs differ in structure or shape.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> x = jnp.ones((4, 2))
        >>> jaxbn.check_fold(lambda x: 2 * x + 1, lambda x: x + x + 1, x)
        0.0
    """
    before, after = apply_before(*inputs), apply_after(*inputs)
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            f"the models return {jax.tree.structure(before)} before and "
            f"{jax.tree.structure(after)} after folding. Compare the same outputs."
        )
    worst = 0.0
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    for (path, want), got in pairs:
        name = jax.tree_util.keystr(path) or "the output"
        want, got = (_as_double(array) for array in (want, got))
        if want.shape != got.shape:
            raise ValueError(
                f"{name} has the shape {want.shape} before and {got.shape} after folding. "
                "Compare the same outputs."
            )
        if want.size == 0:
            continue
        apart = np.abs(want - got)
        place = np.unravel_index(
            np.argmax(np.where(np.isnan(apart), np.inf, apart)), apart.shape
        )
        relative = float(apart[place] / (np.abs(want).max() or 1.0))
        if not relative <= tolerance:
            raise ValueError(
                f"the folded model differs by {relative:.3g} of the largest value of "
                f"{name}, more than tolerance={tolerance:g}: {got[place]:.6g} instead of "
                f"{want[place]:.6g} at {tuple(map(int, place))}. Check which layers are "
                "neighbours, epsilon, and that both models are in inference."
            )
        worst = max(worst, relative)
    return worst


def _as_double(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
