"""Hand-written batch normalization and dropout, side by side, as TensorFlow 1 had them.

    pip install -e '.[examples]' && python examples/tf1/handwritten_dropout.py

takes 8 to 19 s on two CPU cores (jax 0.10.2). Expect a test accuracy of 0.95 with either
dropout, and the message that one compilation served both modes. The program fails below
0.93.

`bn_layer` normalizes dense and convolutional layers alike: moments over all axes but the
last, an ExponentialMovingAverage of them for prediction, a conditional on the fed flag. The
average starts at 0, as TensorFlow's over tensors did: predict after training only, or write
zero_debias=True (examples/tf1/handwritten_images.py tells more).

Dropout has two conventions, and the same network is trained with each. TensorFlow divides
the survivors in training by 1 - rate, and prediction changes nothing. The other keeps the
survivors as they are, and prediction multiplies by 1 - rate. Their accuracies are alike.

In the end one image is predicted alone. With the averages it is told the digit that it has
in a batch; with moments of its own every dense unit has variance 0 and gives beta, so the
logits are the same for all images. That is what the averages are for.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import tf1

Tree = dict[str, Any]
Session = tuple[Tree, Tree]  # the variables: trained params, averaged moments
Batch = tuple[np.ndarray, np.ndarray]
Convention = Literal["training", "inference"]  # when dropout scales

NUM_FILTERS, NUM_UNITS, NUM_CLASSES = 16, 100, 10
CONVENTIONS: tuple[Convention, ...] = ("training", "inference")
EXPECTED_ACCURACY, MARGIN = 0.95, 0.02


def init_bn_layer(channels: int) -> Session:
    """Returns gamma 1 and beta 0, and both averages at 0, where TensorFlow began them."""
    params = {"gamma": jnp.ones(channels), "beta": jnp.zeros(channels)}
    return params, {"mean": jnp.zeros(channels), "variance": jnp.zeros(channels)}


def bn_layer(
    params: Tree,
    state: Tree,
    inputs: jax.Array,
    training: bool | jax.Array,
    moving_decay: float = 0.9,
    eps: float = 1e-5,
) -> tuple[jax.Array, Tree]:
    """Returns inputs [N, C] or [N, H, W, C] normalized, and the new averages."""
    if inputs.ndim not in (2, 4):
        raise ValueError(
            f"the inputs have shape {inputs.shape}, expected rank 2 (dense) or rank 4 "
            "(convolutional). Reshape them so that the last axis holds the channels."
        )
    average = tf1.ExponentialMovingAverage(moving_decay)
    shadows = tf1.MovingAverage(state)
    axes = list(range(inputs.ndim - 1))
    batch_mean, batch_variance = tf1.moments(inputs, axes)

    def update() -> tuple[Tree, Tree]:
        moments = {"mean": batch_mean, "variance": batch_variance}
        return moments, average.average(average.apply(shadows, moments))

    def recall() -> tuple[Tree, Tree]:
        return average.average(shadows), state

    moments, state = jax.lax.cond(training, update, recall)
    mean, variance = moments["mean"], moments["variance"]
    y = tf1.nn_batch_normalization(
        inputs, mean, variance, params["beta"], params["gamma"], eps
    )
    return y, state


def init(key: jax.Array, image_shape: Sequence[int]) -> Session:
    height, width, channels = image_shape
    keys = jax.random.split(key, 3)
    draw = jax.nn.initializers.he_normal()
    flat = height // 2 * (width // 2) * NUM_FILTERS
    norms = {"conv": init_bn_layer(NUM_FILTERS), "dense": init_bn_layer(NUM_UNITS)}
    params = {
        "conv": {"kernel": draw(keys[0], (3, 3, channels, NUM_FILTERS))},
        "dense": {"kernel": draw(keys[1], (flat, NUM_UNITS))},
        "outputs": {
            "kernel": draw(keys[2], (NUM_UNITS, NUM_CLASSES)),
            "bias": jnp.zeros(NUM_CLASSES),
        },
        "norms": {name: params for name, (params, _) in norms.items()},
    }
    return params, {name: state for name, (_, state) in norms.items()}


def network(
    params: Tree,
    state: Tree,
    x: Any,
    training: bool | jax.Array,
    key: jax.Array,
    rate: float | jax.Array,
    scaled_at: Convention,
) -> tuple[jax.Array, Tree]:
    """Returns the logits [N, classes] of images [N, H, W, C], and the new averages."""
    norms = params["norms"]
    # No biases here: `bn_layer` would subtract them, and has one of its own.
    x = jax.lax.conv_general_dilated(
        x,
        params["conv"]["kernel"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x, conv_state = bn_layer(norms["conv"], state["conv"], x, training)
    x = jax.nn.relu(x).reshape(len(x), -1) @ params["dense"]["kernel"]
    x, dense_state = bn_layer(norms["dense"], state["dense"], x, training)
    x = jaxbn.dropout(key, jax.nn.relu(x), rate, training, scaled_at=scaled_at)
    logits = x @ params["outputs"]["kernel"] + params["outputs"]["bias"][None, :]
    return logits, {"conv": conv_state, "dense": dense_state}


@partial(jax.jit, static_argnames="scaled_at")
def step(
    session: Session,
    batch: Batch,
    training: jax.Array,
    key: jax.Array,
    rate: jax.Array,
    learning_rate: jax.Array,
    scaled_at: Convention,
) -> tuple[Session, jax.Array]:
    """Returns the session after a batch, and the accuracy: the traced program."""
    params, state = session
    images, labels = batch

    def loss_fn(params: Tree) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
        logits, new_state = network(params, state, images, training, key, rate, scaled_at)
        log_probabilities = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()
        return loss, (new_state, (logits.argmax(axis=1) == labels).mean())

    gradients, (state, accuracy) = jax.grad(loss_fn, has_aux=True)(params)

    def descend(params: Tree) -> Tree:
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, gradients)

    # The flag holds the params still in inference, as `bn_layer` holds its averages.
    params = jax.lax.cond(training, descend, lambda params: params, params)
    return (params, state), accuracy


def predict_one_by_one(session: Session, images: np.ndarray, scaled_at: Convention) -> None:
    """Prints what becomes of images that are predicted alone, in either mode."""
    predict = jax.jit(network, static_argnames="scaled_at")
    nothing_drawn = {"key": jax.random.key(0), "rate": 0.0, "scaled_at": scaled_at}
    together = predict(*session, images, False, **nothing_drawn)[0].argmax(axis=1)
    for training, statistics in ((False, "averages"), (True, "moments of its own")):
        alone = [
            predict(*session, images[i : i + 1], training, **nothing_drawn)[0].argmax()
            for i in range(len(images))
        ]
        same = int((np.array(alone) == together).sum())
        print(
            f"one image alone, by the {statistics}: {same} of {len(images)} as in a batch, "
            f"{len(set(map(int, alone)))} different digits told"
        )


def main(argv: Sequence[str] | None = None) -> None:
    import _images  # beside this program; `bn_layer` must be importable from anywhere

    parser = _images.argument_parser(__doc__, epochs=8, batch_size=50, learning_rate=0.2)
    help_text = "part of the units that dropout drops"
    parser.add_argument("--rate", type=_images.number(0, 0.99), default=0.2, help=help_text)
    args = parser.parse_args(argv)
    train_set, test_set = _images.load_mnist()
    init_key, order_key, dropout_key = jax.random.split(jax.random.key(args.seed), 3)
    test_batches = list(_images.batches(test_set, args.batch_size))

    accuracies = []
    for scaled_at in CONVENTIONS:
        run = partial(step, rate=args.rate, scaled_at=scaled_at)
        steps = _images.shuffled_batches(
            order_key, train_set, args.batch_size, args.epochs, f"scaled at {scaled_at}"
        )
        session = init(init_key, _images.IMAGE_SHAPE)
        for count, batch in enumerate(steps):
            key = jax.random.fold_in(dropout_key, count)
            session, _ = run(session, batch, True, key, learning_rate=args.learning_rate)
        # Dropout draws nothing in prediction: the key is there for the one program.
        correct = [run(session, b, False, key, learning_rate=0.0)[1] for b in test_batches]
        accuracies.append(float(np.mean(correct)))
        print(f"test accuracy, dropout scaled at {scaled_at}: {accuracies[-1]:.3f}")
    _images.check_one_program(step._cache_size() / len(CONVENTIONS))  # pyright: ignore[reportAttributeAccessIssue]
    predict_one_by_one(session, test_set[0][:50], scaled_at)
    if _images.has_defaults(parser, args):
        lower = min(accuracies)
        _images.check_figure("test accuracy", lower, EXPECTED_ACCURACY, MARGIN)


if __name__ == "__main__":
    main()
