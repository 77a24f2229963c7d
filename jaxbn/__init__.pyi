"""The public names, from which `__init__.py` knows where each is."""

from ._affine import Affine as Affine
from ._affine import as_affine as as_affine
from ._axis_groups import axis_groups as axis_groups
from ._batch_norm import BatchNorm as BatchNorm
from ._dropout import dropout as dropout
from ._ema import Ema as Ema
from ._ema import EmaState as EmaState
from ._fold import fold as fold
from ._fold import fold_into_next as fold_into_next
from ._fold_check import check_fold as check_fold
from ._fold_names import find_pairs as find_pairs
from ._fold_tree import fold_tree as fold_tree
from ._functions import apply as apply
from ._functions import init as init
from ._gather import Gather as Gather
from ._gathered import Gathered as Gathered
from ._gathered import gather as gather
from ._gathered import track_gathered as track_gathered
from ._ghost import GhostBatchNorm as GhostBatchNorm
from ._moments import Moments as Moments
from ._moments import merge_moments as merge_moments
from ._moments import moments as moments
from ._normalize import normalize as normalize
from ._normalizer import Normalizer as Normalizer
from ._population import reestimate as reestimate
from ._renorm import BatchRenorm as BatchRenorm
from ._renorm import RenormStats as RenormStats
from ._renorm_limits import RenormLimits as RenormLimits
from ._renorm_limits import renorm_limits as renorm_limits
from ._replicas import replica_differences as replica_differences
from ._replicas import sync_state as sync_state
from ._running import update_running as update_running
from ._state import BatchNormParams as BatchNormParams
from ._state import BatchStats as BatchStats
from ._sync import sync_moments as sync_moments

__version__: str
