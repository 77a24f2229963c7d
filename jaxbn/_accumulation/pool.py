"""Moments of many layers pooled over batches and processes, in float64 on the host."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.experimental
import numpy as np

from jaxbn._statistics.moments import Moments, merge_moments


class Pool:
    """The moments of every layer over all batches so far.

    The layers lie behind one another in one long `Moments`, so that a batch is one merge.
    """

    def __init__(self, like: dict[str, Moments]):
        self._like = like
        self._total = _joined({name: Moments(*map(_fetch, m)) for name, m in like.items()})
        self._batches = 0
        self._local = True
        self._fault = ""

    def add(self, batch: dict[str, Moments]) -> None:
        """Merges the moments of one more batch."""
        if list(batch) != list(self._like):
            raise TypeError(
                f"a batch has moments of {list(batch)}, but the norms are "
                f"{list(self._like)}. Return a state for every norm, in the same places."
            )
        arrays = jax.tree.leaves(batch)
        self._local = all(getattr(a, "is_fully_addressable", True) for a in arrays)
        fetched = {name: Moments(*map(_fetch, m)) for name, m in batch.items()}
        bad = [name for name, m in fetched.items() if not all(map(_is_finite, m))]
        if bad and not self._fault:
            self._fault = f", first in batch {self._batches} at {', '.join(bad[:5])}"
        with _in_double():
            self._total = _as_numpy(merge_moments(self._total, _joined(fetched)))
        self._batches += 1

    def total(self) -> dict[str, Moments]:
        """Returns the moments of each layer over the batches of all processes, checked."""
        total = self._total
        if self._local and jax.process_count() > 1:
            total = _over_processes(total)
        split = _split(total, self._like)
        # After the exchange, so that all processes raise alike and none waits for ever.
        unfit = [name for name, m in split.items() if not all(map(_is_finite, m))]
        if unfit:
            raise ValueError(
                f"the inputs of {', '.join(unfit[:5])} are not all finite"
                f"{self._fault}. No state was changed. Look for NaN and infinity in the "
                "data and in the params."
            )
        unseen = [name for name, m in split.items() if not (m.count > 0).all()]
        if unseen:
            raise ValueError(
                f"in {self._batches} batches, nothing was gathered for features of "
                f"{', '.join(unseen[:5])}. No state was changed. Pass batches, call every "
                "norm in the forward pass, as a norm of jaxbn, and give none of its "
                "features weight 0 throughout."
            )
        return split


@contextlib.contextmanager
def _in_double() -> Iterator[None]:
    """Lets JAX compute in float64, on the CPU where there is one."""
    enable: Any = getattr(jax, "enable_x64", None)
    if enable is None:  # before JAX 0.8
        enable = jax.experimental.enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        host = None
    with enable(True), jax.default_device(host):
        yield


def _fetch(array: Any) -> Any:
    if not getattr(array, "is_fully_addressable", True) and not array.is_fully_replicated:
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _is_finite(array: Any) -> bool:
    return bool(np.isfinite(array).all())


def _as_numpy(total: Moments) -> Moments:
    arrays: Any = map(np.asarray, total)
    return Moments(*arrays)


def _joined(layers: dict[str, Moments]) -> Moments:
    parts = zip(*layers.values(), strict=True)
    arrays: Any = (np.concatenate([np.ravel(a) for a in part]) for part in parts)
    return Moments(*arrays)


def _split(total: Moments, like: dict[str, Moments]) -> dict[str, Moments]:
    ends = np.cumsum([np.size(m.mean) for m in like.values()])[:-1]
    parts = zip(*(np.split(array, ends) for array in total), strict=True)
    layers = {}
    for (name, shaped), (mean, var, count) in zip(like.items(), parts, strict=True):
        mean = mean if np.iscomplexobj(shaped.mean) else mean.real
        arrays: Any = (a.reshape(np.shape(shaped.mean)) for a in (mean, var, count))
        layers[name] = Moments(*arrays)
    return layers


def _over_processes(total: Moments) -> Moments:
    """Returns the moments of all processes, which each has of its own batches."""
    from jax.experimental import multihost_utils

    mean, var, count = total
    words = np.stack([mean.real, mean.imag, var, count])
    # As bits, since JAX would round float64 on the way.
    bits = words.astype(np.float64).view(np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(bits)).view(np.float64)
    parts = [Moments(re + 1j * im, var, n) for re, im, var, n in everyone]
    if not np.iscomplexobj(mean):
        parts = [part._replace(mean=part.mean.real) for part in parts]
    with _in_double():
        whole = parts[0]
        for part in parts[1:]:
            whole = merge_moments(whole, part)
        return _as_numpy(whole)
