"""What must hold for a fold to be exact, and the one way to refuse what would not be."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._fold.affine import Affine, refused
from jaxbn._typing import Array
from jaxbn._values.canonical import known

# These pad with nothing, or with values of x that have passed the norm too.
_HARMLESS = ("VALID", "CIRCULAR", "REFLECT")


def check_features(
    kernel: Array, bias: Array | None, affine: Affine, norm: int, out: int
) -> None:
    """Raises unless the norm has `norm` features, and the bias `out`."""
    for name, array, want in (
        ("norm", affine.scale, norm),
        ("norm's bias", affine.bias, norm),
        ("bias", bias, out),
    ):
        if array is not None and jnp.shape(array) != (want,):
            raise refused(
                f"the {name} has the shape {jnp.shape(array)}, but the kernel of shape "
                f"{jnp.shape(kernel)} asks for {(want,)}. Check in_axis, out_axis and "
                "groups, and that the two layers are neighbours."
            )


def check_exact(
    spatial: tuple[int, ...], affine: Affine, padding: Any, transposed: bool
) -> None:
    """Raises unless the offset of the norm reaches every output alike."""
    bias = known(affine.bias)
    if not spatial or (bias is not None and not bias.any()):
        return
    if isinstance(padding, str):
        single = padding.upper().startswith("SAME") and math.prod(spatial) == 1
        pads = not single and padding.upper() not in _HARMLESS
    else:
        pads = any(jax.tree.leaves(padding))
    if transposed:
        why = "a transposed convolution spreads it unevenly over its outputs"
    elif padding is None:
        why = "the padding of the convolution is not told"
    elif pads:
        why = f"padding={padding!r} adds zeros behind the norm"
    else:
        return
    raise refused(
        f"the norm has an offset that is not 0, and {why}, so folding would not be exact. "
        "Keep this norm, or fold it into the layer before it; if there is no padding, say "
        'padding="VALID".'
    )


def as_dtype_of_kernel(name: str, array: Array, dtype: jnp.dtype) -> Array:
    """Returns a folded array in the dtype of the kernel, or raises if it does not fit."""
    cast = array.astype(dtype)
    values, rounded = known(array), known(cast)
    if values is None or rounded is None:
        return cast
    lost = np.isfinite(values) & ~np.isfinite(rounded.astype(values.dtype))
    if lost.any():
        raise refused(
            f"the folded {name} holds {np.abs(values[lost]).max():.4g}, and {dtype} ends "
            f"at {float(jnp.finfo(dtype).max):.4g}. Cast the kernel to float32 first, or "
            "look for a running variance near 0."
        )
    return cast
