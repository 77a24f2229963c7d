"""What was measured of a layer, a row of the table."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was measured of a layer; NaN for what was not.

    Example:
        >>> from jaxbn.diagnose import LayerReport
        >>> LayerReport("bn", 64).momentum
        nan

    Attributes:
        name: The path of the layer among the variables.
        features: How many features it normalizes.
        momentum: The decay that a training step applies; NaN for a cumulative mean or a
            layer that tracks nothing.
        shift: How far the running means lie from those of the batches, in standard
            deviations of the batches, root mean square over the features.
        stretch: The factor between the running standard deviations and those of the
            batches, at least 1, geometric over the features.
        noise: How far the mean of one batch lies from that of all, in standard
            deviations: 1 / sqrt(n) for n independent elements per feature.
        gap: How far the output of the model in evaluation moves by this layer, in standard
            deviations of the output, where a gap was found.
        dead: How many features pass nothing on; NaN for observations.
    """

    name: str
    features: int
    momentum: float = math.nan
    shift: float = math.nan
    stretch: float = math.nan
    noise: float = math.nan
    gap: float = math.nan
    dead: float = math.nan


NUMBERS = ("momentum", "shift", "stretch", "noise", "gap", "dead")
