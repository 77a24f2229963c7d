"""What is measured: shapes, layouts, dtypes, passes, and the traffic that each needs."""

import argparse
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

DRAWN = 1 << 20
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Layers of a ResNet-50 at batch 32, in the order of their sizes, and dense ones.
CHANNELS_LAST = (
    (32, 7, 7, 512),
    (32, 14, 14, 256),
    (32, 28, 28, 128),
    (32, 56, 56, 64),
    (32, 56, 56, 256),
    (32, 112, 112, 64),
)
CHANNELS_FIRST = ((32, 512, 7, 7), (32, 256, 14, 14), (32, 64, 56, 56))
DENSE = ((8, 32), (256, 1024))
# The same net at a batch that keeps a GPU busy; first the layers of most bytes.
ON_A_GPU = (
    ((256, 56, 56, 256), "NHWC"),
    ((256, 14, 14, 1024), "NHWC"),
    ((256, 112, 112, 64), "NHWC"),
    ((256, 28, 28, 512), "NHWC"),
    ((256, 7, 7, 2048), "NHWC"),
    ((256, 256, 56, 56), "NCHW"),
    ((256, 1024, 14, 14), "NCHW"),
)
# So many layers follow each other there, or the host would be timed.
DEPTH = 8
QUICK = ((32, 14, 14, 256), (8, 32))

PASSES = (
    "inference",
    "training",
    "gradient",
    "inference+relu",
    "training+relu",
    "gradient+relu",
    "training+add+relu",
    "gradient+add+relu",
)
# Activations read and written: the sums read x, the affine map reads x and writes y; the
# backward sums read x and dy, and dx needs both again. What is added is read once; its
# gradient, dy where y > 0, is written by the sums, which read y for that, and read by dx.
UNITS = {"inference": 2, "training": 3, "gradient": 8}
UNITS_OF_ADDING = {"inference": 1, "training": 1, "gradient": 3}

NETS = {"small net": (32, 32, 32, 32), "ResNet-50": (8, 64, 64, 3)}
IMAGES_ON_A_GPU = (128, 224, 224, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a pass through one layer, or a training step of a net.

    Attributes:
        kind: "layer", or a name of `NETS`.
        shape: Of x; of the images where it is a net.
        layout: "NHWC", "NCHW", or "NC" for two axes.
        dtype: The name of x's dtype.
        what: One of `PASSES`, or "train step" of a net.
        depth: How many such layers follow each other; what is told is the time of one.
    """

    kind: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    what: str
    depth: int = 1

    @property
    def mode(self) -> str:
        return self.what.split("+")[0]

    @property
    def relu(self) -> bool:
        return "relu" in self.what

    @property
    def adds(self) -> bool:
        return "add" in self.what

    @property
    def axis(self) -> int:
        return 1 if self.layout == "NCHW" else -1

    @property
    def bytes_of_x(self) -> int:
        return math.prod(self.shape) * ITEMSIZES[self.dtype]

    @property
    def units(self) -> int:
        """How many times the bytes of x must move, at the least."""
        return UNITS[self.mode] + (UNITS_OF_ADDING[self.mode] if self.adds else 0)

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        return size if self.kind == "layer" else f"{self.kind} {size}"

    def data(self) -> list[np.ndarray]:
        """Returns values of x, dy and what is added, the same for every peer.

        They are drawn once, to be repeated up to x's shape where the peer computes: to
        draw gigabytes, or to send them to a device, would take longer than to time them.
        """
        rng = np.random.default_rng(0)
        size = min(math.prod(self.shape), DRAWN)
        x, *rest = rng.standard_normal((3 if self.adds else 2, size), np.float32)
        return [x * np.float32(1.5) + np.float32(0.5), *rest]


def as_shape(text: str) -> tuple[int, ...]:
    """Reads "32x56x56x64"."""
    parts = text.lower().split("x")
    shape = tuple(int(part) if part.isdigit() else 0 for part in parts)
    if len(shape) not in (2, 4) or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f"a shape is 2 or 4 positive sizes, got {text!r}. Write 32x56x56x64 or 8x32."
        )
    return shape


def layer_cases(
    shapes: Sequence[tuple[int, ...]] | None,
    layout: str | None,
    dtypes: Sequence[str],
    passes: Sequence[str],
    quick: bool,
) -> list[Case]:
    """Returns the rows of layers, the shapes in the given layout or all that are known."""
    if shapes is not None:
        rows = [(shape, layout or "NHWC") for shape in shapes]
    elif quick:
        rows = [(shape, "NHWC") for shape in QUICK]
    else:
        rows = [(shape, "NHWC") for shape in CHANNELS_LAST]
        rows += [(shape, "NCHW") for shape in CHANNELS_FIRST]
        rows += [(shape, "NC") for shape in DENSE]
    rows = [(shape, "NC" if len(shape) == 2 else order) for shape, order in rows]
    if shapes is None and layout is not None:
        rows = [row for row in rows if row[1] == layout]
    return [
        Case("layer", shape, order, dtype, what)
        for what in passes
        for dtype in dtypes
        for shape, order in rows
    ]


def gpu_cases(
    shapes: Sequence[tuple[int, ...]] | None,
    layout: str | None,
    dtypes: Sequence[str],
    passes: Sequence[str],
) -> list[Case]:
    """Returns chains of layers, those first whose times tell most."""
    rows = ON_A_GPU if shapes is None else [(s, layout or "NHWC") for s in shapes]
    return [
        Case("layer", shape, "NC" if len(shape) == 2 else order, dtype, what, DEPTH)
        for shape, order in rows
        for dtype in dtypes
        for what in passes
        if layout in (None, order)
    ]


def net_cases(
    names: Sequence[str], dtypes: Sequence[str], images: tuple[int, ...] | None = None
) -> list[Case]:
    """Returns the rows of nets, with images of their own size or of the given one."""
    return [
        Case(name, images or NETS[name], "NHWC", dtype, "train step")
        for name in names
        for dtype in dtypes
    ]
