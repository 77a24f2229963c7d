"""Hand-written batch normalization for images, as TensorFlow 1 programs had it.

    pip install -e '.[examples]' && python examples/tf1/handwritten_images.py

takes 6 to 12 s on two CPU cores (jax 0.10.2). Expect a test accuracy of 0.95, and the
message that one compilation served both modes. The program fails below 0.93.

`batch_norm` is put together from tf1.moments, tf1.ExponentialMovingAverage and
tf1.nn_batch_normalization, with a conditional on the fed flag `training`, and stands in
`conv_layer` between the convolution and the activation.

What TensorFlow did, and so does `batch_norm`: an average over tensors starts at 0, and the
variance with it. Inference before training divides by sqrt(epsilon), which multiplies x by
316, and with the article's momentum of 0.99 the variance is a tenth of the true one after
ten steps. The table of test losses shows it: 5600 before training, and after 5 steps 6 with
the momentum of 0.9 that is chosen here, 48 with --momentum 0.99. The cure is
ExponentialMovingAverage(momentum, zero_debias=True), or jaxbn.BatchNorm(debias=True).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import tf1

Tree = dict[str, Any]
Session = tuple[Tree, Tree]  # the variables: trained params, averaged moments
Batch = tuple[np.ndarray, np.ndarray]
Activation = Callable[[jax.Array], jax.Array]

NUM_FILTERS, KERNEL_SIZE, NUM_CLASSES = (16, 32), 3, 10
EXPECTED_ACCURACY, MARGIN = 0.95, 0.02


def init_batch_norm(channels: int) -> Session:
    """Returns gamma 1 and beta 0, and both averages at 0, where TensorFlow began them."""
    params = {"gamma": jnp.ones(channels), "beta": jnp.zeros(channels)}
    return params, {"mean": jnp.zeros(channels), "variance": jnp.zeros(channels)}


def batch_norm(
    params: Tree,
    state: Tree,
    inputs: jax.Array,
    training: bool | jax.Array,
    momentum: float | jax.Array = 0.99,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, Tree]:
    """Returns the images [N, H, W, C] normalized for each channel, and the new averages."""
    average = tf1.ExponentialMovingAverage(momentum)
    shadows = tf1.MovingAverage(state)
    batch_mean, batch_variance = tf1.moments(inputs, [0, 1, 2])

    def update() -> tuple[Tree, Tree]:
        moments = {"mean": batch_mean, "variance": batch_variance}
        return moments, average.average(average.apply(shadows, moments))

    def recall() -> tuple[Tree, Tree]:
        return average.average(shadows), state

    moments, state = jax.lax.cond(training, update, recall)
    y = tf1.nn_batch_normalization(
        inputs,
        moments["mean"],
        moments["variance"],
        params["beta"],
        params["gamma"],
        epsilon,
    )
    return y, state


def init_conv_layer(
    key: jax.Array, channels: int, filters: int, kernel_size: int
) -> Session:
    """Returns the variables of a `conv_layer` that makes `filters` out of `channels`."""
    shape = (kernel_size, kernel_size, channels, filters)
    kernel = jax.nn.initializers.glorot_uniform()(key, shape)
    params, state = init_batch_norm(filters)
    return {"kernel": kernel, "bias": jnp.zeros(filters), **params}, state


def pair(size: int | Sequence[int]) -> tuple[int, ...]:
    """Returns the two sizes that one number stands for in tf.layers.conv2d."""
    return (size, size) if isinstance(size, int) else tuple(size)


def conv_layer(
    params: Tree,
    state: Tree,
    inputs: jax.Array,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int],
    padding: str,
    activation: Activation,
    training: bool | jax.Array,
    momentum: float | jax.Array = 0.99,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, Tree]:
    """Returns convolution, `batch_norm` and activation of images [N, H, W, C]."""
    if params["kernel"].shape[:2] != pair(kernel_size):
        raise ValueError(
            f"the kernel has shape {params['kernel'].shape}, but kernel_size is "
            f"{kernel_size}. Give init_conv_layer and conv_layer the same kernel_size."
        )
    convolved = jax.lax.conv_general_dilated(
        inputs,
        params["kernel"],
        window_strides=pair(strides),
        padding=padding.upper(),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # The bias is in the article; the mean that is subtracted next takes it away again.
    convolved = convolved + params["bias"][None, None, None, :]
    y, state = batch_norm(params, state, convolved, training, momentum, epsilon)
    return activation(y), state


def init(key: jax.Array, image_shape: Sequence[int]) -> Session:
    *conv_keys, output_key = jax.random.split(key, len(NUM_FILTERS) + 1)
    height, width, channels = image_shape
    params: Tree = {}
    state: Tree = {}
    for index, (layer_key, filters) in enumerate(zip(conv_keys, NUM_FILTERS, strict=True)):
        name = f"conv{index + 1}"
        params[name], state[name] = init_conv_layer(
            layer_key, channels, filters, KERNEL_SIZE
        )
        height, width, channels = -(-height // 2), -(-width // 2), filters
    shape = (height * width * channels, NUM_CLASSES)
    kernel = jax.nn.initializers.glorot_uniform()(output_key, shape)
    params["outputs"] = {"kernel": kernel, "bias": jnp.zeros(NUM_CLASSES)}
    return params, state


def network(
    params: Tree, state: Tree, x: Any, training: jax.Array, momentum: float | jax.Array
) -> tuple[jax.Array, Tree]:
    """Returns the logits [N, classes] of images [N, H, W, C], and the new averages."""
    new_state: Tree = {}
    for name in state:
        x, new_state[name] = conv_layer(
            params[name],
            state[name],
            x,
            KERNEL_SIZE,
            strides=2,
            padding="same",
            activation=jax.nn.relu,
            training=training,
            momentum=momentum,
        )
    outputs = params["outputs"]
    return x.reshape(len(x), -1) @ outputs["kernel"] + outputs["bias"][None, :], new_state


@jax.jit
def step(
    session: Session,
    batch: Batch,
    learning_rate: jax.Array,
    momentum: jax.Array,
    training: jax.Array,
) -> tuple[Session, jax.Array, jax.Array]:
    """Returns the session after a batch, the loss and the accuracy: the traced program."""
    params, state = session
    images, labels = batch

    def loss_fn(params: Tree) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
        logits, new_state = network(params, state, images, training, momentum)
        log_probabilities = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()
        return loss, (new_state, (logits.argmax(axis=1) == labels).mean())

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (state, accuracy)), gradients = gradient_fn(params)

    def descend(params: Tree) -> Tree:
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, gradients)

    # The flag holds the params still in inference, as `batch_norm` holds its averages.
    params = jax.lax.cond(training, descend, lambda params: params, params)
    return (params, state), loss, accuracy


def main(argv: Sequence[str] | None = None) -> None:
    import _images  # beside this program; `conv_layer` must be importable from anywhere

    parser = _images.argument_parser(__doc__, epochs=8, batch_size=50, learning_rate=0.1)
    help_text = "decay of the averages; 0.99 is the article's"
    parser.add_argument(
        "--momentum", type=_images.number(0, 1), default=0.9, help=help_text
    )
    args = parser.parse_args(argv)
    train_set, test_set = _images.load_mnist()
    init_key, order_key = jax.random.split(jax.random.key(args.seed))
    session = init(init_key, _images.IMAGE_SHAPE)
    test_batches = list(_images.batches(test_set, args.batch_size))

    def test() -> tuple[float, float]:
        """Returns loss and accuracy with the averages as they are."""
        runs = [step(session, batch, 0.0, args.momentum, False) for batch in test_batches]
        loss, accuracy = (float(np.mean([run[i] for run in runs])) for i in (1, 2))
        return loss, accuracy

    table = []
    steps = _images.shuffled_batches(
        order_key, train_set, args.batch_size, args.epochs, "convolution, norm, relu"
    )
    for count, batch in enumerate(steps):
        if count in (0, 5, 10, 30, 80):
            table.append((count, *test()))
        session, _, _ = step(session, batch, args.learning_rate, args.momentum, True)
    loss, accuracy = test()
    print("steps   test loss   test accuracy")
    for row in (*table, (count + 1, loss, accuracy)):
        print("{:5}{:12.3f}{:16.3f}".format(*row))
    _images.check_one_program(step._cache_size())  # pyright: ignore[reportAttributeAccessIssue]
    if _images.has_defaults(parser, args):
        _images.check_figure("test accuracy", accuracy, EXPECTED_ACCURACY, MARGIN)


if __name__ == "__main__":
    main()
