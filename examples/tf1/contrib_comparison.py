"""The arguments of tf.contrib.layers.batch_norm compared on one convolutional network.

    pip install -e '.[examples]' && python examples/tf1/contrib_comparison.py

takes 13 to 20 s on two CPU cores (jax 0.10.2) and prints this table (the last digits vary):

                            train: loss  accuracy   test: loss  accuracy
    defaults                      0.282     0.920        1.409     0.685
    zero debias                   0.282     0.920        1.643     0.490
    decay 0.99                    0.282     0.920        0.776     0.880
    decay 0.9                     0.282     0.920        0.289     0.911
    scale                         0.275     0.920        0.282     0.916
    renorm                        0.285     0.919        0.294     0.914
    small batches                 0.191     0.947        0.228     0.927
    small batches, renorm         0.188     0.947        0.226     0.935

Training goes by the moments of each batch, the test by the moving statistics. So the decay
changes nothing in training, and much in the test: after 160 steps a decay of 0.999, the
default, has moved only 15 percent of the way from mean 0 and variance 1 to the truth, 0.99
has moved 80, and 0.9 all. Zero debias alone is no cure and may be worse: it corrects the
mean, while the variance stays near 1 and the network sees images that are too faint.

The last five lines have decay 0.9. The gamma of `scale` does what the next layer can do as
well. Renorm, whose limits widen between a quarter and a half of the training, changes
little, even in batches of 4: a convolution averages over positions too, so the moments of
the smallest batch here are those of 196 values. Small batches gain by taking 12 times as
many steps.

The program fails if decay 0.9 has a test accuracy below 0.88, if the test loss does not
grow with the decay or 0.999 and zero debias do not double it, or if scale or renorm change
it by 0.1.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import tf1

Tree = dict[str, Any]
Session = tuple[Tree, Tree]  # the variables: trained params, moving statistics
Batch = tuple[np.ndarray, np.ndarray]

NUM_FILTERS, NUM_CLASSES = (8, 16), 10
NUM_LAST = 2000  # images, for the training figures
EXPECTED_ACCURACY, MARGIN = 0.91, 0.03


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line of the table: the arguments of tf.contrib.layers.batch_norm and a batch."""

    decay: float = 0.999
    scale: bool = False
    renorm: bool = False
    zero_debias: bool = False
    small_batch: bool = False

    def layer(self, training: bool | jax.Array, percent: float | jax.Array) -> Any:
        """Returns the layer after `percent` of the training; both may be traced."""
        # As the paper of renorm has it: plain at first, while its averages are wrong.
        limits = jaxbn.renorm_limits(percent, start=25, r_steps=50, d_steps=50)
        clipping = {"rmin": limits.r_min, "rmax": limits.r_max, "dmax": limits.d_max}
        return tf1.batch_norm(
            decay=self.decay,
            scale=self.scale,
            activation_fn=jax.nn.relu,
            is_training=training,
            zero_debias_moving_mean=self.zero_debias,
            renorm=self.renorm,
            renorm_clipping=clipping if self.renorm else None,
            renorm_decay=0.9,
        )


SETTINGS = {
    "defaults": Setting(),
    "zero debias": Setting(zero_debias=True),
    "decay 0.99": Setting(decay=0.99),
    "decay 0.9": Setting(decay=0.9),
    "scale": Setting(decay=0.9, scale=True),
    "renorm": Setting(decay=0.9, renorm=True),
    "small batches": Setting(decay=0.9, small_batch=True),
    "small batches, renorm": Setting(decay=0.9, renorm=True, small_batch=True),
}


def init(key: jax.Array, image_shape: Sequence[int], setting: Setting) -> Session:
    *conv_keys, output_key = jax.random.split(key, len(NUM_FILTERS) + 1)
    height, width, channels = image_shape
    params: Tree = {}
    state: Tree = {}
    draw = jax.nn.initializers.glorot_uniform()
    for index, (layer_key, filters) in enumerate(zip(conv_keys, NUM_FILTERS, strict=True)):
        name = f"conv{index + 1}"
        height, width = -(-height // 2), -(-width // 2)
        norm, state[name] = setting.layer(True, 0).init((1, height, width, filters))
        params[name] = {"kernel": draw(layer_key, (3, 3, channels, filters)), "norm": norm}
        channels = filters
    kernel = draw(output_key, (height * width * channels, NUM_CLASSES))
    params["outputs"] = {"kernel": kernel, "bias": jnp.zeros(NUM_CLASSES)}
    return params, state


def network(params: Tree, state: Tree, x: Any, layer: Any) -> tuple[jax.Array, Tree]:
    """Returns the logits [N, classes] of images [N, H, W, C], and the new state."""
    new_state: Tree = {}
    for name in state:
        kernel, norm = params[name]["kernel"], params[name]["norm"]
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x, new_state[name] = layer.apply(norm, state[name], x)
    outputs = params["outputs"]
    return x.reshape(len(x), -1) @ outputs["kernel"] + outputs["bias"][None, :], new_state


@partial(jax.jit, static_argnames="setting")
def step(
    session: Session,
    batch: Batch,
    learning_rate: jax.Array,
    percent: jax.Array,
    training: jax.Array,
    setting: Setting,
) -> tuple[Session, jax.Array, jax.Array]:
    """Returns the session after a batch, the loss and the accuracy: the traced program."""
    params, state = session
    images, labels = batch
    layer = setting.layer(training, percent)

    def loss_fn(params: Tree) -> tuple[jax.Array, tuple[Tree, jax.Array]]:
        logits, new_state = network(params, state, images, layer)
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


class Result(NamedTuple):
    """A line of the table; the training figures are those of the last 2000 images."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def train(
    session: Session,
    train_batches: Iterable[Batch],
    num_steps: int,
    test_batches: Iterable[Batch],
    learning_rate: float,
    setting: Setting,
) -> Result:
    """Trains by the moments of each batch, and tests by the moving statistics."""
    seen = []
    for count, batch in enumerate(train_batches):
        percent = 100 * count / num_steps
        session, *figures = step(session, batch, learning_rate, percent, True, setting)
        seen.append(figures)
    last = seen[-(NUM_LAST // len(batch[1])) :]
    tests = [step(session, batch, 0.0, 100.0, False, setting)[1:] for batch in test_batches]
    return Result(*map(float, (*np.mean(last, axis=0), *np.mean(tests, axis=0))))


def check_order(results: dict[str, Result]) -> None:
    """Ends the program with an error unless the table shows what the header tells."""
    by_decay = [results[name] for name in ("decay 0.9", "decay 0.99", "defaults")]
    train_losses = [result.train_loss for result in by_decay]
    test_losses = [result.test_loss for result in by_decay]
    best = test_losses[0]
    for claim, true in (
        ("decay changes nothing in training", max(train_losses) < min(train_losses) + 0.01),
        ("the test loss grows with the decay", test_losses == sorted(test_losses)),
        ("decay 0.999 doubles the test loss", results["defaults"].test_loss > 2 * best),
        ("so does zero debias", results["zero debias"].test_loss > 2 * best),
        ("scale changes it by less than 0.1", abs(results["scale"].test_loss - best) < 0.1),
        ("so does renorm", abs(results["renorm"].test_loss - best) < 0.1),
        ("decay 0.9 tests well", by_decay[0].test_accuracy > EXPECTED_ACCURACY - MARGIN),
    ):
        if not true:
            raise SystemExit(
                f"Expected of the default options, but not seen in the table: {claim}."
            )


def main(argv: Sequence[str] | None = None) -> None:
    import _images  # beside this program; `network` must be importable from anywhere

    parser = _images.argument_parser(__doc__, epochs=2, batch_size=50, learning_rate=0.1)
    parser.add_argument(
        "--small-batch-size",
        type=_images.whole(2, 50),
        default=4,
        help="images a step in the lines with small batches",
    )
    args = parser.parse_args(argv)
    train_set, test_set = _images.load_mnist()
    init_key, order_key = jax.random.split(jax.random.key(args.seed))
    results = {}
    for name, setting in SETTINGS.items():
        size = args.small_batch_size if setting.small_batch else args.batch_size
        session = init(init_key, _images.IMAGE_SHAPE, setting)
        steps = _images.shuffled_batches(order_key, train_set, size, args.epochs, name)
        num_steps = args.epochs * (_images.NUM_TRAIN // size)
        tests = _images.batches(test_set, size)
        rate = args.learning_rate * (size / args.batch_size) ** 0.5
        results[name] = train(session, steps, num_steps, tests, rate, setting)

    print(f"{'':24}train: loss  accuracy   test: loss  accuracy")
    for name, result in results.items():
        print("{:24}{:11.3f}{:10.3f}{:13.3f}{:10.3f}".format(name, *result))
    _images.check_one_program(step._cache_size() / len(SETTINGS))  # pyright: ignore[reportAttributeAccessIssue]
    if _images.has_defaults(parser, args):
        check_order(results)


if __name__ == "__main__":
    main()
