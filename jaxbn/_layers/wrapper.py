"""Normalizers that hold another one: what they do not change, it answers."""

import functools
import operator
from typing import Any

from jaxbn._layers.normalizer import Normalizer, Params, State
from jaxbn._values.journeys import Value


class Wrapper(Value, Normalizer[Params, State]):
    """A normalizer around `wrapped`, which answers all that a subclass does not change."""

    @property
    def wrapped(self) -> Any:
        """The normalizer inside."""
        raise NotImplementedError


def _asked_inside(name: str) -> Any:
    """Returns the method `name` of `Normalizer`, answered by the normalizer inside."""

    @functools.wraps(getattr(Normalizer, name))
    def answer(self: Any, *args: Any, **options: Any) -> Any:
        return getattr(self.wrapped, name)(*args, **options)

    return answer


# Set here, not declared in the class: their types are those that `Normalizer` declares.
_FIELDS = "activation", "axis_index_groups", "axis_name", "dtype", "feature_axes"
for _name in (*_FIELDS, "bank", "ghost_batches"):
    setattr(Wrapper, _name, property(operator.attrgetter(f"wrapped.{_name}")))
_METHODS = "check", "correction", "init", "running", "scale_and_bias", "standardize"
for _name in (*_METHODS, "track"):
    setattr(Wrapper, _name, _asked_inside(_name))
