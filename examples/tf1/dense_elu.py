"""The dense network of TensorFlow 1 with a fed `training` flag: dense, norm, elu, twice.

    pip install -e '.[examples]' && python examples/tf1/dense_elu.py

takes 5 to 10 s on two CPU cores (jax 0.10.2). Expect a test accuracy of 0.92, and the
message that one compilation served both modes. The program fails below 0.90.

What was `tf.placeholder_with_default(False, shape=())` is the argument `training` of
`session_run`, False unless the caller says True. Inside it is an array like any other, so
one compiled program trains and predicts. What was the collection UPDATE_OPS is the state
that `network` returns: there is no operation that one could forget to run.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import tf1

Tree = dict[str, Any]
Session = tuple[Tree, Tree]  # the variables: trained params, moving statistics
Batch = tuple[np.ndarray, np.ndarray]

NUM_PIXELS, HIDDEN_SIZES, NUM_CLASSES = 784, (300, 100), 10
EXPECTED_ACCURACY, MARGIN = 0.92, 0.02


def network(
    params: Tree,
    state: Tree,
    x: Any,
    training: bool | jax.Array,
    momentum: float = 0.9,
    epsilon: float = 1e-3,
) -> tuple[jax.Array, Tree]:
    """Returns the logits [N, classes] of `x` [N, features], and the new state."""
    norm = tf1.batch_normalization(momentum=momentum, epsilon=epsilon)
    hidden1 = dense(params["hidden1"], x)
    bn1, state1 = norm.apply(params["bn1"], state["bn1"], hidden1, training)
    hidden2 = dense(params["hidden2"], jax.nn.elu(bn1))
    bn2, state2 = norm.apply(params["bn2"], state["bn2"], hidden2, training)
    logits = dense(params["outputs"], jax.nn.elu(bn2))
    return logits, {"bn1": state1, "bn2": state2}


@jax.jit
def step(
    session: Session, batch: Batch, learning_rate: jax.Array, training: jax.Array
) -> tuple[Session, jax.Array, jax.Array]:
    """Returns the session after a batch, the loss and the accuracy: the traced program."""
    params, state = session
    images, labels = batch

    def loss_fn(params: Tree) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
        x = images.reshape(len(images), NUM_PIXELS)
        logits, new_state = network(params, state, x, training)
        log_probabilities = jax.nn.log_softmax(logits)
        loss = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1).mean()
        return loss, (new_state, (logits.argmax(axis=1) == labels).mean())

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (state, accuracy)), gradients = gradient_fn(params)

    def descend(params: Tree) -> Tree:
        return jax.tree.map(lambda p, g: p - learning_rate * g, params, gradients)

    # The flag holds the params still in inference, as the layers hold their statistics.
    params = jax.lax.cond(training, descend, lambda params: params, params)
    return (params, state), loss, accuracy


def session_run(
    session: Session, batch: Batch, *, learning_rate: float = 0.0, training: bool = False
) -> tuple[Session, float, float]:
    """Runs `step` with `training` fed: False by default, as the placeholder was."""
    session, loss, accuracy = step(session, batch, learning_rate, training)
    return session, float(loss), float(accuracy)


def init(key: jax.Array) -> Session:
    """Returns the variables that tf.layers created for this network, with their names."""
    sizes = (NUM_PIXELS, *HIDDEN_SIZES, NUM_CLASSES)
    params: Tree = {}
    state: Tree = {}
    for index, layer_key in enumerate(jax.random.split(key, len(sizes) - 1)):
        name = f"hidden{index + 1}" if index < len(HIDDEN_SIZES) else "outputs"
        num_inputs, num_units = sizes[index : index + 2]
        params[name] = {
            "kernel": jax.nn.initializers.glorot_uniform()(
                layer_key, (num_inputs, num_units)
            ),
            "bias": jnp.zeros(num_units),
        }
        if name != "outputs":
            norm = f"bn{index + 1}"
            params[norm], state[norm] = tf1.batch_normalization().init((1, num_units))
    return params, state


def dense(params: Tree, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"][None, :]


def main(argv: Sequence[str] | None = None) -> None:
    import _images  # beside this program; `network` must be importable from anywhere

    parser = _images.argument_parser(__doc__, epochs=8, batch_size=50, learning_rate=0.2)
    args = parser.parse_args(argv)
    train_set, test_set = _images.load_mnist()
    init_key, order_key = jax.random.split(jax.random.key(args.seed))
    session = init(init_key)
    test_batches = list(_images.batches(test_set, args.batch_size))

    def test_accuracy() -> float:
        return float(np.mean([session_run(session, batch)[2] for batch in test_batches]))

    print(f"test accuracy before training: {test_accuracy():.3f}")
    for batch in _images.shuffled_batches(
        order_key, train_set, args.batch_size, args.epochs, "dense, norm, elu"
    ):
        session, _, _ = session_run(
            session, batch, learning_rate=args.learning_rate, training=True
        )
    accuracy = test_accuracy()
    _images.check_one_program(step._cache_size())  # pyright: ignore[reportAttributeAccessIssue]
    print(f"test accuracy after {args.epochs} epochs: {accuracy:.3f}")
    if _images.has_defaults(parser, args):
        _images.check_figure("test accuracy", accuracy, EXPECTED_ACCURACY, MARGIN)


if __name__ == "__main__":
    main()
