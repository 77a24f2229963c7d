"""What is checked of the arguments of a Haiku layer before any work."""

from typing import Any

import jax
import numpy as np

from jaxbn._statistics.running import check_momentum
from jaxbn._typing import Array


def training_of(is_training: Any) -> bool | Array:
    """Returns the mode, or raises unless it is one."""
    if isinstance(is_training, (bool, np.bool_, np.ndarray, jax.Array)):
        return is_training if isinstance(is_training, jax.Array) else bool(is_training)
    raise TypeError(
        f"is_training must be a bool, got {is_training!r}. Write is_training=True to "
        "normalize with the statistics of the batch, False for the running ones."
    )


def check_initializer(name: str, creates: bool, init: Any) -> None:
    """Raises if an initializer is given for what is not created."""
    if init is not None and not creates:
        raise ValueError(
            f"Cannot set `{name}_init` if `create_{name}=False`. Write "
            f"create_{name}=True, or leave {name}_init out."
        )


def check_not_created(name: str, creates: bool, given: Any) -> None:
    """Raises if the call gives what the layer has created."""
    if given is not None and creates:
        raise ValueError(
            f"Cannot pass `{name}` at call time if `create_{name}=True`. Write "
            f"create_{name}=False for a {name} that comes from elsewhere."
        )


def check_decay(decay_rate: Any) -> None:
    """Raises unless `decay_rate` is a decay in [0, 1], or is traced."""
    try:
        check_momentum(decay_rate)
    except (TypeError, ValueError) as error:
        # In Haiku's word.
        message = str(error).replace("momentum", "decay_rate", 1)
        raise type(error)(message) from None
    if decay_rate is None:
        raise TypeError(
            "decay_rate must be a number, got None. For the mean of all batches so far, "
            "write Norm(jaxbn.BatchNorm(momentum=None))."
        )
