"""Flax linen: `BatchNorm` that changes one import, `Norm` for any normalizer."""

from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
from jaxbn.linen._norm import Norm as Norm
from jaxbn.linen._reestimate import gather as gather
from jaxbn.linen._reestimate import reestimate as reestimate
from jaxbn.linen._reestimate import track_gathered as track_gathered
from jaxbn.linen._train_state import TrainState as TrainState
from jaxbn.linen._train_state import restore as restore
