"""A case as a JAX program: what is timed, and the memory that it needs."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import Case
from tests.benchmarks.layers import Layer, UnfitError, Wanted, make_layer
from tests.benchmarks.nets import train_step
from tests.benchmarks.traffic import kernels

Pass = Callable[..., Any]
NUM_BLOCKS = 8


class Program:
    """A compiled pass of a peer: calls it, and tells its bytes and what it computed."""

    def __init__(self, peer: str, case: Case):
        self._case = case
        self.layers = case.depth
        if case.kind == "layer":
            self._arguments, run = layer_pass(peer, case)
            self._run = jax.jit(run)
            self._carried = 0
        else:
            self._arguments, run = train_step(peer, case)
            # As in a training: the old params and state give their memory to the new ones.
            self._run = jax.jit(run, donate_argnums=0)
            self._carried = 1
        compiled = self._run.lower(*self._arguments).compile()
        memory = compiled.memory_analysis()
        self.temp = memory.temp_size_in_bytes / case.bytes_of_x if memory else math.nan
        self.kernels = len(kernels(compiled.as_text() or "")) / case.depth
        self.check = [_magnitude(leaf) for leaf in self._results(self.call())]

    def call(self) -> Any:
        result = self._run(*self._arguments)
        if self._carried:
            result, self._arguments = result[1], (result[0], *self._arguments[1:])
        return result

    def times(self, calls: int) -> None:
        """Runs the pass so many times, and returns when the last is finished."""
        result = None
        for _ in range(calls):
            result = self.call()
        jax.block_until_ready(result)

    def _results(self, result):
        shape = () if self._carried else self._case.shape
        return [leaf for leaf in jax.tree.leaves(result) if leaf.shape == shape]


class DeviceFloor:
    """The traffic of a pass as copies on an accelerator, where a sweep in C cannot run."""

    temp = kernels = None
    check: tuple[float, ...] = ()

    def __init__(self, case: Case):
        if case.kind != "layer":
            raise UnfitError("a net has convolutions")
        self._x = jnp.ones(case.shape, case.dtype)
        # A copy moves two units; twice the layers, so that their copies are whole.
        self.layers, copies = 2 * case.depth, case.depth * case.units

        @jax.jit
        def copy(x):
            for _ in range(copies):
                x = jax.lax.optimization_barrier(-x)
            return x

        self._copy = copy

    def times(self, calls: int) -> None:
        """Copies the bytes of so many passes."""
        result = None
        for _ in range(calls):
            result = self._copy(self._x)
        jax.block_until_ready(result)


def _magnitude(array: jax.Array) -> float:
    return float(np.abs(np.asarray(array, np.float32)).mean())


def layer_pass(peer: str, case: Case) -> tuple[tuple[Any, ...], Pass]:
    """Returns arguments and a function of them, not yet jitted."""
    x, dy, *added = _arrays(case)
    wanted = Wanted(
        case.shape[case.axis], len(case.shape), case.axis, case.dtype, case.relu
    )
    layer = chained(make_layer(peer, wanted), case.depth)
    if case.mode == "gradient":
        return (layer.params, layer.state, x, dy, *added), gradient(layer)

    def run(params, state, x, *added):
        return layer.apply(params, state, x, case.mode == "training", *added)

    return (layer.params, layer.state, x, *added), run


@functools.lru_cache(maxsize=1)
def _arrays(case: Case) -> list[jax.Array]:
    """Returns x, dy and what is added; the peers of a row share them."""
    return [jnp.resize(jnp.asarray(a, case.dtype), case.shape) for a in case.data()]


def chained(layer: Layer, depth: int) -> Layer:
    """Returns layers one after another; XLA fuses none with the next, as in a net."""
    if depth == 1:
        return layer

    def apply(params, states, x, *rest):
        new = []
        for param, state in zip(params, states, strict=True):
            x, state = layer.apply(param, state, x, *rest)
            x = jax.lax.optimization_barrier(x)
            new.append(state)
        return x, new

    copies = [jax.tree.map(jnp.array, layer[:2]) for _ in range(depth)]
    params, states = map(list, zip(*copies, strict=True))
    return Layer(params, states, apply)


def gradient(layer: Layer) -> Pass:
    """Returns a function of params, state, x and dy: y, new state, gradients."""

    def run(params, state, x, dy, *added):
        y, pull, state = jax.vjp(
            lambda params, x, *added: layer.apply(params, state, x, True, *added),
            params,
            x,
            *added,
            has_aux=True,
        )
        return y, state, pull(dy.astype(y.dtype))

    return run


def residuals(peer: str, shape: tuple[int, ...], dtype: str, relu: bool) -> float:
    """Returns what a forward pass keeps for its backward pass, in units of x."""
    layer = make_layer(peer, Wanted(shape[-1], len(shape), -1, dtype, relu))
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def kept(params, x):
        return jax.vjp(
            lambda params, x: layer.apply(params, layer.state, x, True),
            params,
            x,
            has_aux=True,
        )[1]

    return _bytes(jax.eval_shape(jax.jit(kept), layer.params, x)) / _bytes(x)


def block_residuals(peer: str, shape: tuple[int, ...], dtype: str) -> float:
    """Returns what a convolution, normalization and ReLU keep, in activations."""
    features = shape[-1]
    layer = make_layer(peer, Wanted(features, len(shape), -1, dtype, True))
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    kernel = jax.ShapeDtypeStruct((3, 3, features, features), jnp.dtype(dtype))

    def loss(kernels, params, x):
        for weight, param in zip(kernels, params, strict=True):
            x = jax.lax.conv_general_dilated(
                x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, _ = layer.apply(param, layer.state, x, True)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    def kept(kernels, params, x):
        return jax.vjp(loss, kernels, params, x)[1]

    kinds = jax.eval_shape(
        jax.jit(kept), [kernel] * NUM_BLOCKS, [layer.params] * NUM_BLOCKS, x
    )
    # The kernels are kept by every net; only what is of x's size counts.
    large = [leaf for leaf in jax.tree.leaves(kinds) if leaf.size >= math.prod(shape)]
    return _bytes(large) / _bytes(x) / NUM_BLOCKS


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
