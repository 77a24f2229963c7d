"""Batch normalization for JAX: pure functions over explicit params and state.

Example:
    >>> import jax.numpy as jnp, jaxbn
    >>> bn = jaxbn.BatchNorm(momentum=0.9)
    >>> params, state = bn.init(3)
    >>> y, state = bn.apply(params, state, jnp.ones((8, 3)), training=True)
"""

from jaxbn._affine import Affine as Affine
from jaxbn._affine import as_affine as as_affine
from jaxbn._axis_groups import axis_groups as axis_groups
from jaxbn._batch_norm import BatchNorm as BatchNorm
from jaxbn._dropout import dropout as dropout
from jaxbn._ema import Ema as Ema
from jaxbn._ema import EmaState as EmaState
from jaxbn._fold import fold as fold
from jaxbn._fold import fold_into_next as fold_into_next
from jaxbn._fold_check import check_fold as check_fold
from jaxbn._fold_names import find_pairs as find_pairs
from jaxbn._fold_tree import fold_tree as fold_tree
from jaxbn._functions import apply as apply
from jaxbn._functions import init as init
from jaxbn._gather import Gather as Gather
from jaxbn._gathered import Gathered as Gathered
from jaxbn._gathered import gather as gather
from jaxbn._gathered import track_gathered as track_gathered
from jaxbn._ghost import GhostBatchNorm as GhostBatchNorm
from jaxbn._moments import Moments as Moments
from jaxbn._moments import merge_moments as merge_moments
from jaxbn._moments import moments as moments
from jaxbn._normalize import normalize as normalize
from jaxbn._normalizer import Normalizer as Normalizer
from jaxbn._population import reestimate as reestimate
from jaxbn._renorm import BatchRenorm as BatchRenorm
from jaxbn._renorm import RenormStats as RenormStats
from jaxbn._renorm_limits import RenormLimits as RenormLimits
from jaxbn._renorm_limits import renorm_limits as renorm_limits
from jaxbn._replicas import replica_differences as replica_differences
from jaxbn._replicas import sync_state as sync_state
from jaxbn._running import update_running as update_running
from jaxbn._state import BatchNormParams as BatchNormParams
from jaxbn._state import BatchStats as BatchStats
from jaxbn._sync import sync_moments as sync_moments

__version__ = "0.1.0"
