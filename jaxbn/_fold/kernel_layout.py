"""Where in the kernel of a linear layer its features are, whatever framework made it."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxbn._typing import Array


class KernelLayout(NamedTuple):
    """Where in a kernel the features are."""

    in_axis: int
    out_axis: int
    groups: int
    groups_on: str

    def spread(self, kernel: Array) -> Array:
        """Returns the kernel as [..., groups, in of a group, out of a group]."""
        axes, rank = (self.in_axis, self.out_axis), kernel.ndim
        if not all(-rank <= a < rank for a in axes) or axes[0] % rank == axes[1] % rank:
            raise ValueError(
                f"in_axis={axes[0]} and out_axis={axes[1]} do not name two axes of the "
                f"kernel of shape {kernel.shape}. Flax has them at -2 and -1."
            )
        if self.groups_on not in ("in", "out"):
            raise ValueError(
                f'groups_on must be "in" or "out", got {self.groups_on!r}. It names the '
                "axis that counts the features of all groups."
            )
        size = kernel.shape[axes[self.groups_on == "out"]]
        if self.groups < 1 or size % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide the {size} features of the kernel "
                f"of shape {kernel.shape}. Check groups, in_axis and out_axis."
            )
        kernel = jnp.moveaxis(kernel, axes, (-2, -1))
        if self.groups_on == "in":
            return kernel.reshape(*kernel.shape[:-2], self.groups, -1, kernel.shape[-1])
        kernel = kernel.reshape(*kernel.shape[:-1], self.groups, -1)
        return jnp.moveaxis(kernel, -2, -3)

    def join(self, grouped: Array) -> Array:
        """Undoes `spread`."""
        if self.groups_on == "out":
            kernel = jnp.moveaxis(grouped, -3, -2)
            kernel = kernel.reshape(*kernel.shape[:-2], -1)
        else:
            kernel = grouped.reshape(*grouped.shape[:-3], -1, grouped.shape[-1])
        return jnp.moveaxis(kernel, (-2, -1), (self.in_axis, self.out_axis))
