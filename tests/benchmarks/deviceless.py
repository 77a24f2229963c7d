"""The programs whose bytes are counted for accelerators that are not there."""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.benchmarks.layers import Wanted, make_layer

PEERS = ("jaxbn", "linen")
DTYPES = ("float32", "bfloat16")
DEPTH = 4

Compile = Callable[[Callable[..., Any], tuple[Any, ...]], Any]


class Programs:
    """Functions of a layer of channels last, with the kinds of their arguments."""

    def __init__(self, peer: str, shape: tuple[int, ...], dtype: str, relu: bool):
        self._layer = make_layer(peer, Wanted(shape[-1], len(shape), -1, dtype, relu))
        self.x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        self._variables = (self._layer.params, self._layer.state)

    def training(self):
        """Returns y and the new state."""
        return self._apply, (*self._variables, self.x)

    def forward(self):
        """Returns y, the new state, and what the backward pass needs."""

        def run(params, state, x):
            y, pull, state = jax.vjp(
                lambda x, params: self._apply(params, state, x), x, params, has_aux=True
            )
            return y, state, pull

        return run, (*self._variables, self.x)

    def backward(self):
        """Returns the gradients from what the forward pass kept."""
        run, arguments = self.forward()
        y, _, pull = jax.eval_shape(run, *arguments)
        return (lambda pull, dy: pull(dy)), (pull, y)

    def squares(self):
        """Returns the gradients of the sum of the squares of y, and the new state."""

        def loss(params, x, state):
            y, state = self._apply(params, state, x)
            return jnp.sum(jnp.square(y.astype(jnp.float32))), state

        params, state = self._variables
        return jax.grad(loss, (0, 1), has_aux=True), (params, self.x, state)

    def blocks(self):
        """Returns the gradients of a chain of 1x1 convolutions, layers and ReLUs."""
        features = self.x.shape[-1]

        def loss(x, kernels, params, state):
            for kernel, param in zip(kernels, params, strict=True):
                x, _ = self._apply(param, state, jnp.einsum("nhwc,cd->nhwd", x, kernel))
            return jnp.sum(x.astype(jnp.float32) * 0.5)

        params, state = self._variables
        kernel = jax.ShapeDtypeStruct((features, features), self.x.dtype)
        arguments = (self.x, [kernel] * DEPTH, [params] * DEPTH, state)
        return jax.grad(loss, (0, 1, 2)), arguments

    def _apply(self, params, state, x):
        return self._layer.apply(params, state, x, True)


def on_device(tree: Any, sharding: Any) -> Any:
    """Returns the kinds of arrays, as arguments on the device of a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def print_rows(count: Callable[[str, str, bool], dict[str, float]]) -> None:
    """Prints a row of counts for each peer, dtype and activation, as JSON."""
    rows = [
        {"peer": peer, "dtype": dtype, "relu": relu, **count(peer, dtype, relu)}
        for relu in (False, True)
        for dtype in DTYPES
        for peer in PEERS
    ]
    json.dump(rows, sys.stdout)
