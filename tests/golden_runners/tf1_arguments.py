"""Decodes the arguments that the recordings of TensorFlow hold; what is unknown raises."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import tf1

ACTIVATIONS = {
    None: None,
    "elu": jax.nn.elu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.2),
    "log_sigmoid": jax.nn.log_sigmoid,
    "log_softmax": jax.nn.log_softmax,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "swish": jax.nn.swish,
    "tanh": jnp.tanh,
}


def norm(w, axis):
    return jnp.sqrt(jnp.square(w).sum(axis, keepdims=True))


def constant(value):
    return lambda key, shape, dtype: (
        jnp.full(shape, value, dtype)
        if np.ndim(value) == 0
        else jnp.asarray(value, dtype).reshape(shape)
    )


CONSTANT = {"constant", "zeros", "ones"}
INITIALIZERS = {
    "constant": constant,
    "zeros": lambda: jax.nn.initializers.zeros,
    "ones": lambda: jax.nn.initializers.ones,
    # What was drawn is in the recorded state.
    "random_uniform": lambda minval, maxval, seed: jax.nn.initializers.uniform(),
    "random_normal": lambda mean, stddev, seed: jax.nn.initializers.normal(),
}


def magnitude(w):
    """Returns |w| with TensorFlow's gradient, which is 0 at 0, where JAX has 1."""
    return w * jax.lax.stop_gradient(jnp.sign(w))


REGULARIZERS = {
    "contrib_l1": lambda scale: lambda w: scale * magnitude(w).sum(),
    "contrib_l2": lambda scale: lambda w: scale * jnp.square(w).sum() / 2,
    "contrib_l1_l2": lambda scale_l1, scale_l2: (
        lambda w: scale_l1 * magnitude(w).sum() + scale_l2 * jnp.square(w).sum() / 2
    ),
    "keras_l1": lambda l: lambda w: l * magnitude(w).sum(),  # noqa: E741
    "keras_l2": lambda l: lambda w: l * jnp.square(w).sum(),  # noqa: E741
    "keras_l1_l2": lambda l1, l2: (
        lambda w: l1 * magnitude(w).sum() + l2 * jnp.square(w).sum()
    ),
}


def min_max_norm(min_value=0.0, max_value=1.0, rate=1.0, axis=0):
    def project(w):
        have = norm(w, axis)
        want = rate * jnp.clip(have, min_value, max_value) + (1 - rate) * have
        return w * want / (1e-7 + have)

    return project


CONSTRAINTS = {
    "non_neg": lambda: lambda w: jnp.maximum(w, 0),
    "max_norm": lambda max_value, axis=0: min_max_norm(0.0, max_value, 1.0, axis),
    "min_max_norm": min_max_norm,
    "unit_norm": lambda axis=0: min_max_norm(1.0, 1.0, 1.0, axis),
    "clip": lambda lo, hi: lambda w: jnp.clip(w, lo, hi),
}
ENCODINGS = {"init": INITIALIZERS, "reg": REGULARIZERS, "constraint": CONSTRAINTS}


def encoded(value):
    """Returns the function that a dict such as {"reg": "keras_l2", "l": 0.1} tells of."""
    if value is None:
        return None
    (kind,) = set(ENCODINGS) & set(value)
    options = {name: option for name, option in value.items() if name != kind}
    return ENCODINGS[kind][value[kind]](**options)


def adjustment(value):
    if value is None:
        return None
    assert set(value) == {"scale", "bias"}, value
    pair = tuple(np.asarray(value[name], np.float32) for name in ("scale", "bias"))
    return lambda shape: pair


def several(value):
    return value and {name: encoded(each) for name, each in value.items()}


DECODERS = {
    **{
        f"{name}_{what}": encoded
        for what in ("initializer", "regularizer", "constraint")
        for name in ("beta", "gamma", "moving_mean", "moving_variance")
    },
    "param_initializers": several,
    "param_regularizers": several,
    "adjustment": adjustment,
    "activation_fn": ACTIVATIONS.__getitem__,
    "updates_collections": lambda value: tf1.UPDATE_OPS if value == "UPDATE_OPS" else value,
    "renorm_clipping": lambda value: value,  # the values of a step replace "per_step"
}


def decode(kwargs):
    """Returns the arguments to call with."""
    decoded = {}
    for name, value in kwargs.items():
        if isinstance(value, dict) and name not in DECODERS:
            raise ValueError(f"the argument {name}={value} is not understood")
        decoded[name] = DECODERS.get(name, lambda value: value)(value)
    return decoded


def constants(kwargs):
    """Returns the names of the variables that `kwargs` initialize to a constant."""
    given = dict(kwargs.get("param_initializers") or {})
    for name in ("beta", "gamma", "moving_mean", "moving_variance"):
        if kwargs.get(f"{name}_initializer") is not None:
            given[name] = kwargs[f"{name}_initializer"]
    return {name for name, spec in given.items() if spec["init"] in CONSTANT}
