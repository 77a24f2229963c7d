"""Sums and products of twice the precision, as unevaluated sums of two numbers.

Needed where sums over devices must not cancel: one collective carries them all.
"""

from collections.abc import Sequence

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


def halves_below(a: Array, above: Array) -> Pair:
    """Returns `a` as a sum of two numbers, the first with half the digits below `above`.

    `a` is what the rounding of a sum left out, of `above`. Cut where its own digits begin,
    as `halves` does, those of several devices would not be cut at one place.
    """
    digits = jnp.finfo(a.dtype).nmant + 1
    # Adding 1.5 units of such a size rounds the digits below away.
    unit = jnp.asarray(1.5 * 2.0 ** -(digits // 2), a.dtype) * _leading(above, 1)
    high = (a + unit) - unit
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
    low, low_rest = two_sum(a_low * b_low, cross_rest)
    product, rest = two_sum(a_high * b_high, cross)
    rest, last = two_sum(rest, low)
    product, rest = two_sum(product, rest)
    return product, rest + (last + low_rest)


def compensated_sum(first: Array, *others: Array) -> Pair:
    """Returns the sum of terms rounded, and what that lost (Ogita, Rump and Oishi).

    The largest terms come first.
    """
    total, rest = first, jnp.zeros_like(first)
    for term in others:
        total, lost = two_sum(total, term)
        rest = rest + lost
    return two_sum(total, rest)


def interleaved(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    """Returns the terms of both, in turns."""
    return [term for pair in zip(a, b, strict=True) for term in pair]
