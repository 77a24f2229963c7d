"""Normalizers that hold another one: what they do not change, it answers."""

from typing import Any, TypeVar

from jaxbn._layers.normalizer import Normalizer
from jaxbn._state import BatchNormParams
from jaxbn._statistics.moments import Moments
from jaxbn._typing import (
    Activation,
    Array,
    Axes,
    AxisGroups,
    AxisName,
    DTypeLike,
    Pair,
)

State = TypeVar("State")


class Wrapper(Normalizer[BatchNormParams, State]):
    """A normalizer around `wrapped`, which answers all that a subclass does not change."""

    @property
    def wrapped(self) -> Any:
        """The normalizer inside."""
        raise NotImplementedError

    @property
    def feature_axes(self) -> Axes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The axis or axes that keep statistics of their own."""
        return self.wrapped.feature_axes

    @property
    def axis_name(self) -> AxisName | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The mapped axis, or axes, over which a batch is spread."""
        return self.wrapped.axis_name

    @property
    def axis_index_groups(self) -> AxisGroups | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Groups of device indices that share statistics."""
        return self.wrapped.axis_index_groups

    @property
    def activation(self) -> Activation | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Applied last."""
        return self.wrapped.activation

    @property
    def dtype(self) -> DTypeLike | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dtype of the result."""
        return self.wrapped.dtype

    @property
    def ghost_batches(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How the batch is divided in training."""
        return self.wrapped.ghost_batches

    def init(self, num_features: int | tuple[int, ...], **options: Any) -> Any:
        """Returns the params and the state of the normalizer inside."""
        return self.wrapped.init(num_features, **options)

    def track(self, state: State, batch: Moments, **options: Any) -> State:
        """Returns the state after one update with the moments of a batch."""
        return self.wrapped.track(state, batch, **options)

    def running(self, state: State) -> Pair:
        """Returns the mean and the variance that inference normalizes with."""
        return self.wrapped.running(state)

    def standardize(self, mean: Array, var: Array) -> tuple[Array, Array | None]:
        """Returns what (x - mean) is multiplied by, and what is added then."""
        return self.wrapped.standardize(mean, var)

    def scale_and_bias(self, params: BatchNormParams) -> Any:
        """Returns the trained scale and bias."""
        return self.wrapped.scale_and_bias(params)

    def correction(self, state: State, batch: Moments, **options: Any) -> Pair | None:
        """Returns what multiplies and shifts the standardized batch in training."""
        return self.wrapped.correction(state, batch, **options)

    def check(self, state: State, x: Array, tracks: bool, **options: Any) -> None:
        """Raises if the arguments of `apply` do not fit."""
        self.wrapped.check(state, x, tracks, **options)
