"""Sums and products of twice the precision, as unevaluated sums of two numbers.

Needed where sums over devices must not cancel: one collective carries them all.
"""

import jax.numpy as jnp
from jax import lax

from jaxbn._typing import Array, Pair


def settled(a: Array) -> Array:
    """Returns `a` without its last digit, taken from its bits.

    What follows then sees a number. Where `a` is a product, the compiler may otherwise
    fuse it with each sum that it enters, unrounded here and rounded there.
    """
    return _leading(a, jnp.finfo(a.dtype).nmant)


def halves(a: Array) -> Pair:
    """Returns `a` as a sum of two numbers of half its digits each.

    Thousands of leading halves of about one size add up without any rounding.
    """
    high = _leading(a, (jnp.finfo(a.dtype).nmant + 1) // 2)
    return high, a - high


def _leading(a: Array, digits: int) -> Array:
    info = jnp.finfo(a.dtype)
    unsigned = jnp.dtype(f"uint{info.bits}")
    dropped = (1 << (info.nmant + 1 - digits)) - 1
    kept = jnp.array((1 << info.bits) - 1 - dropped, unsigned)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a, unsigned) & kept, a.dtype)


def two_sum(a: Array, b: Array) -> Pair:
    """Returns a + b rounded, and what the rounding lost (Knuth)."""
    total = a + b
    from_b = total - a
    return total, (a - (total - from_b)) + (b - from_b)


def two_product(a: Array, b: Array) -> Pair:
    """Returns a b rounded, and what the rounding lost.

    Built from products of halves, which are exact: whether the compiler fuses a
    multiplication with an addition then makes no difference, as it would in Dekker's.
    """
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    cross, cross_rest = two_sum(a_high * b_low, a_low * b_high)
    product, rest = two_sum(a_high * b_high, cross)
    return product, rest + (cross_rest + a_low * b_low)
