"""Batch normalization for JAX: pure functions over explicit params and state.

Example:
    >>> import jax.numpy as jnp, jaxbn
    >>> bn = jaxbn.BatchNorm(momentum=0.9)
    >>> params, state = bn.init(3)
    >>> y, state = bn.apply(params, state, jnp.ones((8, 3)), training=True)
"""

import importlib as _importlib

# Many batches.
from jaxbn._accumulation.gather import Gather as Gather
from jaxbn._accumulation.reestimate import reestimate as reestimate
from jaxbn._accumulation.state import Gathered as Gathered
from jaxbn._accumulation.state import gather as gather
from jaxbn._accumulation.state import track_gathered as track_gathered

# Averages and noise.
from jaxbn._averages import Ema as Ema
from jaxbn._averages import EmaState as EmaState
from jaxbn._dropout import dropout as dropout

# Folding.
from jaxbn._fold.affine import Affine as Affine
from jaxbn._fold.affine import as_affine as as_affine
from jaxbn._fold.check import check_fold as check_fold
from jaxbn._fold.kernels import fold as fold
from jaxbn._fold.kernels import fold_into_next as fold_into_next
from jaxbn._fold.pairs import find_pairs as find_pairs
from jaxbn._fold.tree import fold_tree as fold_tree

# The pieces.
from jaxbn._kernels.normalize import normalize as normalize

# The layer.
from jaxbn._layers.batch_norm import BatchNorm as BatchNorm

# Variants.
from jaxbn._layers.batch_renorm import BatchRenorm as BatchRenorm
from jaxbn._layers.batch_renorm import RenormStats as RenormStats
from jaxbn._layers.functions import apply as apply
from jaxbn._layers.functions import init as init
from jaxbn._layers.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
from jaxbn._layers.normalizer import Normalizer as Normalizer
from jaxbn._layers.renorm_limits import RenormLimits as RenormLimits
from jaxbn._layers.renorm_limits import renorm_limits as renorm_limits

# Devices.
from jaxbn._replicas import replica_differences as replica_differences
from jaxbn._replicas import sync_state as sync_state
from jaxbn._state import BatchNormParams as BatchNormParams
from jaxbn._state import BatchStats as BatchStats
from jaxbn._state import RunningStats as RunningStats
from jaxbn._state import register_stats as register_stats
from jaxbn._statistics.moments import Moments as Moments
from jaxbn._statistics.moments import merge_moments as merge_moments
from jaxbn._statistics.moments import moments as moments
from jaxbn._statistics.named_axes import axis_groups as axis_groups
from jaxbn._statistics.running import update_running as update_running
from jaxbn._statistics.sync import sync_moments as sync_moments

__version__ = "0.1.0"

_EXTRAS = {
    "convert": "convert",
    "diagnose": "diagnose",
    "linen": "flax",
    "nnx": "flax",
    "optim": "optax",
    "tf1": None,
}


def __getattr__(name: str):
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
