"""Training steps of two nets around the layer of a peer: what a user feels."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import Case
from tests.benchmarks.layers import Wanted, make_layer

NUM_CLASSES = 10
LEARNING_RATE = 1e-3
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))


class _Net:
    """Collects the params and states of a net as it is written down, then replays them.

    The first run draws weights in order of their use; later runs take them in that order.
    """

    def __init__(self, peer: str, dtype: str):
        self._peer, self._dtype = peer, dtype
        self._rng = np.random.default_rng(0)
        self._layers: list[Any] = []
        self.weights: list[Any] = []
        self.params: list[Any] = []
        self.state: list[Any] = []
        self._draws = True

    def replay(self, weights, params, state) -> None:
        self._draws, self._new_state = False, []
        self._turn: tuple[Iterator[Any], ...] = tuple(
            map(iter, (weights, params, state, self._layers))
        )

    def new_state(self) -> list[Any]:
        return self._new_state

    def conv(self, x, features, size, stride=1):
        shape = (size, size, x.shape[-1], features)
        weight = self._weight(shape, size * size * x.shape[-1])
        return jax.lax.conv_general_dilated(
            x,
            weight.astype(x.dtype),
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def dense(self, x, features):
        return x @ self._weight((x.shape[-1], features), x.shape[-1])

    def norm(self, x, relu=True, residual=None):
        if self._draws:
            wanted = Wanted(x.shape[-1], x.ndim, -1, self._dtype, relu)
            with jax.ensure_compile_time_eval():
                layer = make_layer(self._peer, wanted)
            self._layers.append(layer)
            self.params.append(layer.params)
            self.state.append(layer.state)
            return x
        _, params, state, layers = self._turn
        params, state, layer = next(params), next(state), next(layers)
        y, state = layer.apply(params, state, x, True, residual)
        self._new_state.append(state)
        return y

    def _weight(self, shape, fan_in):
        if not self._draws:
            return next(self._turn[0])
        drawn = self._rng.standard_normal(shape, np.float32)
        self.weights.append(drawn * np.float32((2 / fan_in) ** 0.5))
        return jnp.zeros(shape)


def _small_net(net, x):
    for _ in range(4):
        x = net.norm(net.conv(x, 32, 3))
    return x


def _resnet50(net, x):
    x = net.norm(net.conv(x, 64, 7, 2))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for features, depth, first_stride in STAGES:
        for number in range(depth):
            stride = 1 if number else first_stride
            y = net.norm(net.conv(x, features, 1))
            y = net.norm(net.conv(y, features, 3, stride))
            y = net.conv(y, 4 * features, 1)
            if not number:
                x = net.norm(net.conv(x, 4 * features, 1, stride), relu=False)
            x = net.norm(y, residual=x)
    return x


NETS = {"small net": _small_net, "ResNet-50": _resnet50}


def train_step(peer: str, case: Case) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Returns arguments and a step of them: the new first argument, and the loss."""
    net = _Net(peer, case.dtype)

    def logits(x):
        x = NETS[case.kind](net, x)
        return net.dense(x.mean(axis=(1, 2), dtype=jnp.float32), NUM_CLASSES)

    images = jnp.resize(jnp.asarray(case.data()[0], case.dtype), case.shape)
    labels = jnp.arange(case.shape[0]) % NUM_CLASSES
    jax.eval_shape(logits, images)
    # Copies, since no two of them may share the memory that they give away.
    variables = jax.tree.map(jnp.array, (net.weights, net.params, net.state))

    def step(variables, images, labels):
        *trained, state = variables

        def loss(trained):
            weights, params = trained
            net.replay(weights, params, state)
            logs = jax.nn.log_softmax(logits(images))
            picked = jnp.take_along_axis(logs, labels[:, None], axis=1)
            return -picked.mean(), net.new_state()

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        trained = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, trained, grads)
        return (*trained, new), value

    return (variables, images, labels), step
