"""A training: what is drawn of it, its batches, and how its variables are named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import jaxbn

PROCESSES, DEVICES = 2, 8  # of all processes
LAYERS = 2
BN = jaxbn.BatchNorm(momentum=0.9)
NORMALIZERS = {
    "plain": BN,
    "unbiased": jaxbn.BatchNorm(momentum=0.8, ddof=1, epsilon=1e-3),
    "debiased": jaxbn.BatchNorm(momentum=0.95, debias=True),
    "cumulative": jaxbn.BatchNorm(momentum=None),
    "renorm": jaxbn.BatchRenorm(BN, momentum=0.8),
    "ghosts": jaxbn.GhostBatchNorm(BN, 8, layout="strided"),
}
STYLES = "sharded jit", "shard_map"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training does; all of it follows from these numbers."""

    seed: int
    normalizer: str
    style: str
    rows: int  # of the whole batch
    features: int
    steps: int
    weighted: bool
    every: int  # steps from checkpoint to checkpoint
    rate: float = 0.01

    @classmethod
    def draw(cls, seed: int) -> "Plan":
        rng = np.random.default_rng(seed)
        normalizer = str(rng.choice(list(NORMALIZERS)))
        # Over named axes a ghost batch is one of all devices, which the twin does not know.
        style = STYLES[0] if normalizer == "ghosts" else str(rng.choice(STYLES))
        return cls(
            seed=seed,
            normalizer=normalizer,
            style=style,
            rows=int(rng.choice([16, 64, 1024])),
            features=int(rng.choice([4, 8, 24])),
            steps=int(rng.integers(60, 400)),
            weighted=bool(rng.random() < 0.5),
            every=int(rng.integers(5, 40)),
        )

    @property
    def layer(self) -> Any:
        return NORMALIZERS[self.normalizer]

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Returns x, weights or None, and one cotangent for the output of each layer."""
        rng = np.random.default_rng((self.seed, step))
        shape = self.rows, self.features
        x = rng.normal(size=shape) * 2 + rng.normal(size=self.features) + 3
        dy = rng.normal(size=(LAYERS, *shape))
        weights = rng.integers(0, 3, self.rows).astype(np.float32)
        return x.astype(np.float32), weights if self.weighted else None, dy.astype("f4")

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def to_arrays(variables: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of the layers' (params, state) by name."""
    return {
        f"{layer}.{part}.{name}": np.asarray(array)
        for layer, pair in enumerate(variables)
        for part, values in zip(("params", "state"), pair, strict=True)
        for name, array in values._asdict().items()
        if array is not None
    }


def from_arrays(like: Any, arrays: dict[str, Any]) -> Any:
    """Undoes `to_arrays`, given variables of the same kind."""
    return [
        tuple(
            type(values)(
                **{
                    name: None if old is None else arrays[f"{layer}.{part}.{name}"]
                    for name, old in values._asdict().items()
                }
            )
            for part, values in zip(("params", "state"), pair, strict=True)
        )
        for layer, pair in enumerate(like)
    ]


def last_step(folder: Path) -> int:
    """Returns the step of the last checkpoint in a folder, 0 for none."""
    return max((int(path.stem) for path in folder.glob("[0-9]*.npz")), default=0)
