"""The limits of batch renormalization, and how they widen over training."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxbn._compat import exported
from jaxbn._typing import Array
from jaxbn._values.canonical import as_number, as_settled, known
from jaxbn._values.journeys import as_call


@exported
class RenormLimits(NamedTuple):
    """How far the correction of batch renormalization may go; each may be traced.

    Example:
        >>> import jaxbn
        >>> jaxbn.RenormLimits(r_min=1.0, r_max=1.0, d_max=0.0)  # plain normalization
        RenormLimits(r_min=1.0, r_max=1.0, d_max=0.0)

    Attributes:
        r_min: The smallest factor r, in [0, 1].
        r_max: The largest factor r, at least 1; `jnp.inf` for no limit.
        d_max: The largest offset d in either direction, at least 0; `jnp.inf` likewise.
    """

    r_min: float | Array = 1 / 3
    r_max: float | Array = 3.0
    d_max: float | Array = 5.0

    def __repr__(self) -> str:
        defaults = self._field_defaults
        fields = ((name, limit, defaults[name]) for name, limit in self._asdict().items())
        return as_call("RenormLimits", fields)


def renorm_limits(
    step: float | Array,
    *,
    start: int = 5_000,
    r_steps: int = 40_000,
    d_steps: int = 25_000,
    r_max: float = 3.0,
    d_max: float = 5.0,
) -> RenormLimits:
    """Returns the limits of the paper's schedule at a training step.

    Plain normalization (r = 1, d = 0) until `start`, then limits that widen linearly and
    reach `r_max` at `r_steps` and `d_max` at `d_steps`. The factor is at least 1 / r.

    Args:
        step: The number of training steps so far; may be traced.
        start: The step at which the limits begin to widen.
        r_steps: The step at which r reaches its final limit.
        d_steps: The step at which d reaches its final limit.
        r_max: The final largest factor.
        d_max: The final largest offset.

    Returns:
        `RenormLimits` for `BatchRenorm.apply(..., limits=...)`.

    Raises:
        ValueError: A limit widens before `start`, r_max is below 1 or d_max below 0.

    Example:
        >>> import jaxbn
        >>> limits = jaxbn.renorm_limits(40_000)
        >>> print(limits.r_max, limits.d_max)
        3.0 5.0

    References:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
        Batch-Normalized Models", 2017, section 4.
    """
    remedy = "It is a step of the training, not a duration."
    begin, r_end, d_end = (
        as_number(name, value, remedy)
        for name, value in (("start", start), ("r_steps", r_steps), ("d_steps", d_steps))
    )
    if not begin < min(r_end, d_end):
        raise ValueError(
            f"the limits must widen after start={start}, got r_steps={r_steps} and "
            f"d_steps={d_steps}. They are steps of the training, not durations."
        )
    check_limits(RenormLimits(0.0, r_max, d_max))

    def progress(end: float) -> Array:
        done = jnp.asarray(step, jnp.float32) - begin
        return jnp.clip(done / (end - begin), 0.0, 1.0)

    r = 1 + (r_max - 1) * progress(r_end)
    return RenormLimits(1 / r, r, d_max * progress(d_end))


def check_limits(limits: RenormLimits) -> None:
    """Raises unless limits that can be known are in their ranges."""
    if not isinstance(limits, RenormLimits):
        raise TypeError(
            f"limits must be a RenormLimits, got {type(limits).__name__}. Write "
            "RenormLimits(r_min=..., r_max=..., d_max=...)."
        )
    for name, limit in limits._asdict().items():
        remedy = "Write a number such as 3.0, or jnp.inf for no limit."
        value = known(as_settled(name, limit, remedy))
        low, high = {"r_min": (0, 1), "r_max": (1, jnp.inf), "d_max": (0, jnp.inf)}[name]
        if value is not None and not low <= value <= high:
            raise ValueError(
                f"{name} must be a number in [{low}, {high}], got {limit}. A factor r of 1 "
                "and an offset d of 0 leave plain normalization."
            )
