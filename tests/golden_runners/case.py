"""One recorded case: its description, its arrays, and how near is near enough."""

import numpy as np

# What rounding alone costs a sane implementation, relative to the largest value.
FLOOR = {"float64": 1e-6, "float32": 1e-5, "float16": 2e-2, "bfloat16": 5e-2}


class Case:
    """A case of a manifest; arrays are read when asked for."""

    def __init__(self, folder, meta, observed):
        self.meta = meta
        self.system, self.name = meta["system"], meta["name"]
        self._file = folder / self.system / f"{self.name}.npz"
        # The share of the recorded numbers that is the real system's own rounding.
        self._observed = max(observed.get(f"{self.system}/{self.name}", {0: 0.0}).values())
        self._arrays = None

    def __str__(self):
        return f"{self.system}-{self.name}"

    def __getitem__(self, key):
        if self._arrays is None:
            with np.load(self._file, allow_pickle=False) as arrays:
                self._arrays = dict(arrays)
        return self._arrays[key]

    @property
    def kwargs(self):
        return self.meta["kwargs"]

    @property
    def steps(self):
        return self.meta["steps"]

    @property
    def tolerance(self):
        """The error that is allowed, relative to the largest value of an array."""
        dtypes = {self.meta["dtype"]} | {step.get("y_dtype") for step in self.steps}
        return max(4 * self._observed, *(FLOOR[dtype] for dtype in dtypes - {None}))

    def factor(self, step):
        """Returns the mask of a step times its weights, what there is of both, or None."""
        given = [self[step[name]] for name in ("mask", "weights") if name in step]
        if len(given) < 2:
            return given[0] if given else None
        mask, weights = given
        rank = max(mask.ndim, weights.ndim)
        mask, weights = (
            a.reshape(a.shape + (1,) * (rank - a.ndim)) for a in (mask, weights)
        )
        return np.where(mask, weights, 0)


def assert_near(got, want, tolerance, what, where=True, terms=0.0):
    """Compares relative to the largest expected value of each feature (last axis).

    `terms` is the size of what was added up to get there, where much of it cancels.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, recorded {want.shape}"
    got, want = (np.where(where, array, 0) for array in (got, want))
    axes = tuple(range(want.ndim - 1))
    scale = np.maximum(np.abs(want).max(axes, initial=0.0), terms) + 1e-3
    error = (np.abs(got - want) / scale).max(initial=0.0)
    assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"
