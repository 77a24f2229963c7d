"""Batch normalization for JAX: pure functions over explicit params and state.

Example:
    >>> import jax.numpy as jnp, jaxbn
    >>> bn = jaxbn.BatchNorm(momentum=0.9)
    >>> params, state = bn.init(3)
    >>> y, state = bn.apply(params, state, jnp.ones((8, 3)), training=True)
"""

import importlib as _importlib
from typing import Any as _Any

from jaxbn._accumulation.gather import Gather
from jaxbn._accumulation.reestimate import reestimate
from jaxbn._accumulation.state import Gathered, gather, track_gathered
from jaxbn._averages import Ema, EmaState
from jaxbn._fold.affine import Affine, as_affine
from jaxbn._fold.check import check_fold
from jaxbn._fold.kernels import fold, fold_into_next
from jaxbn._fold.pairs import find_pairs
from jaxbn._fold.tree import fold_tree
from jaxbn._kernels.normalize import normalize
from jaxbn._layers.batch_norm import BatchNorm
from jaxbn._layers.batch_renorm import BatchRenorm
from jaxbn._layers.checks import in_our_words as _in_our_words
from jaxbn._layers.domain_batch_norm import DomainBatchNorm
from jaxbn._layers.dropout import dropout
from jaxbn._layers.functions import apply, init
from jaxbn._layers.ghost_batch_norm import GhostBatchNorm
from jaxbn._layers.normalizer import Normalizer
from jaxbn._layers.renorm_limits import RenormLimits, renorm_limits
from jaxbn._state import (
    BatchNormParams,
    BatchStats,
    RenormStats,
    RunningStats,
    register_stats,
)
from jaxbn._statistics.moments import Moments, merge_moments, moments
from jaxbn._statistics.named_axes import axis_groups
from jaxbn._statistics.pool_states import pool_states
from jaxbn._statistics.replicas import replica_differences, sync_state
from jaxbn._statistics.running import update_running
from jaxbn._statistics.sync import sync_moments

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (in the order of the documentation)
    # The layer.
    "BatchNorm",
    "BatchNormParams",
    "BatchStats",
    "apply",
    "init",
    # Variants, and one of your own.
    "BatchRenorm",
    "DomainBatchNorm",
    "GhostBatchNorm",
    "Normalizer",
    "RenormLimits",
    "RenormStats",
    "RunningStats",
    "register_stats",
    "renorm_limits",
    # The pieces.
    "Moments",
    "merge_moments",
    "moments",
    "normalize",
    "update_running",
    # Devices.
    "axis_groups",
    "pool_states",
    "replica_differences",
    "sync_moments",
    "sync_state",
    # Many batches.
    "Gather",
    "Gathered",
    "gather",
    "reestimate",
    "track_gathered",
    # Folding.
    "Affine",
    "as_affine",
    "check_fold",
    "find_pairs",
    "fold",
    "fold_into_next",
    "fold_tree",
    # Averages and noise.
    "Ema",
    "EmaState",
    "dropout",
]

# Pickles and tracebacks then name the public module, whichever file defines a name.
for _name in __all__:
    globals()[_name].__module__ = __name__

# These lie below what answers the words of other libraries.
for _name in ("moments", "normalize", "sync_moments", "update_running"):
    globals()[_name] = _in_our_words(globals()[_name])

# The subpackages that are imported when they are used first, and their extras.
_EXTRAS = {
    "convert": "convert",
    "diagnose": "diagnose",
    "equinox": "equinox",
    "haiku": "haiku",
    "linen": "flax",
    "nnx": "flax",
    "optim": "optax",
    "tf1": None,
}


def __getattr__(name: str) -> _Any:
    """Imports a subpackage when it is used first, or tells which extra installs it."""
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"jaxbn.{name} needs the package {error.name}, which is not installed. Run "
            f"pip install 'jaxbn[{_EXTRAS[name]}]'.",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXTRAS})
