"""What people write who come from elsewhere, and what to write here instead."""

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

# Each word with its answers: the first counts whose parameter the function has. The
# answer of "" is for functions that have none of these parameters.
_MODE = {
    "is_training": "is_training={value}",
    "inference": "inference=not {word}",
    "training": "training={value}",
    "use_running_average": "use_running_average=not {word}",
    "": "the mode in the call: bn.apply(params, state, x, training=True)",
}
_INFERENCE = {
    "is_training": "is_training=not {word}",
    "inference": "inference={value}",
    "training": "training=not {word}",
    "use_running_average": "use_running_average={value}",
    "": "the mode in the call: bn.apply(params, state, x, training=False)",
}
_AXIS = {
    "feature_axes": "feature_axes, which names the axes that are kept: -1 for channels "
    "last, 1 for channels first",
    "data_format": "data_format, channels_last or channels_first",
    "axis": "axis, the feature axis: -1 for channels last, 1 for channels first",
    "": "it as a setting of the layer: BatchNorm(feature_axes=...)",
}
_SIZE = {
    "num_features": "num_features={value}",
    "input_size": "input_size={value}",
    "decay_rate": "nothing instead: the layer takes the number of features from x",
    "use_running_average": "nothing instead: the layer takes the number of features from x",
    "": "it in the call of init: params, state = BatchNorm(...).init({value})",
}
_EPSILON = {
    "epsilon": "epsilon={value}",
    "eps": "eps={value}",
    "": "BatchNorm(epsilon={value})",
}
_MOMENTUM = {
    "momentum": "momentum={value}, the decay, of which PyTorch's momentum is 1 minus",
    "decay_rate": "decay_rate={value}, of which PyTorch's momentum is 1 minus",
    "": "BatchNorm(momentum={value})",
}
_USE_BIAS = {
    "use_bias": "use_bias={value}",
    "channelwise_affine": "channelwise_affine={value}, for weight and bias",
    "create_offset": "create_offset={value}",
    "": "BatchNorm(use_bias={value})",
}
_USE_SCALE = {
    "use_scale": "use_scale={value}",
    "channelwise_affine": "channelwise_affine={value}, for weight and bias",
    "create_scale": "create_scale={value}",
    "": "BatchNorm(use_scale={value})",
}
_SCALE = {
    "scale": "scale={value}",
    "use_scale": "use_scale=True or False",
    "": "params.scale, or BatchNorm(use_scale=...)",
}
_BIAS = {
    "bias": "bias={value}",
    "use_bias": "use_bias=True or False",
    "": "params.bias, or BatchNorm(use_bias=...)",
}
_AFFINE = {
    "channelwise_affine": "channelwise_affine={value}",
    "create_scale": "create_scale={value}, create_offset={value}",
    "use_scale": "use_scale={value}, use_bias={value}",
    "": "BatchNorm(use_scale={value}, use_bias={value})",
}
_WEIGHTS = {
    "mask": "mask=..., a boolean array that is True for what counts",
    "weights": "weights={value}, a boolean array that is True for what counts, or numbers",
    "": "it in the call: bn.apply(params, state, x, training, weights=...)",
}
_AXIS_NAME = {
    "axis_name": "axis_name={value}, the name of a mapped axis",
    "cross_replica_axis": "cross_replica_axis={value}, the name of a mapped axis",
    "": "BatchNorm(axis_name=...), the name of a mapped axis",
}
_SCALE_INIT = {
    "scale_init": "scale_init, a function of (key, shape, dtype)",
    "": "bn.init(num_features, scale_init=...)",
}
_BIAS_INIT = {
    "bias_init": "bias_init, a function of (key, shape, dtype)",
    "": "bn.init(num_features, bias_init=...)",
}
_ANSWERS: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("train", "training", "is_training", "train_mode"), _MODE),
    **dict.fromkeys(
        ("inference", "eval", "deterministic", "use_running_average", "test_local_stats"),
        _INFERENCE,
    ),
    **dict.fromkeys(("axis", "axes", "dim", "channel_axis", "channel_index"), _AXIS),
    **dict.fromkeys(("feature_axis", "feature_axes"), _AXIS),
    **dict.fromkeys(("data_format", "reduction_axes"), _AXIS),
    **dict.fromkeys(("num_features", "features", "in_features"), _SIZE),
    **dict.fromkeys(("input_size", "num_channels", "channels"), _SIZE),
    **dict.fromkeys(("size", "shape", "input_shape", "normalized_shape"), _SIZE),
    **dict.fromkeys(("eps", "epsilon", "variance_epsilon"), _EPSILON),
    **dict.fromkeys(("decay", "decay_rate", "momentum", "ema_decay"), _MOMENTUM),
    **dict.fromkeys(("center", "use_offset", "create_offset", "use_bias"), _USE_BIAS),
    **dict.fromkeys(("create_scale", "use_scale"), _USE_SCALE),
    **dict.fromkeys(("scale", "gamma", "weight"), _SCALE),
    **dict.fromkeys(("bias", "beta", "offset"), _BIAS),
    **dict.fromkeys(("affine", "elementwise_affine"), _AFFINE),
    **dict.fromkeys(("mask", "weights", "sample_weight", "where"), _WEIGHTS),
    **dict.fromkeys(
        ("axis_name", "axis_names", "cross_replica_axis", "batch_axis_name"), _AXIS_NAME
    ),
    **dict.fromkeys(("scale_init", "gamma_initializer", "gamma_init"), _SCALE_INIT),
    **dict.fromkeys(
        ("bias_init", "offset_init", "beta_initializer", "beta_init"), _BIAS_INIT
    ),
    "variance": {"var": "var={value}"},
    "cross_replica_axis_index_groups": {"axis_index_groups": "axis_index_groups={value}"},
    "synchronized": {
        "": "BatchNorm(axis_name=...) under pmap, shard_map or vmap; plain jax.jit needs "
        "nothing, since its statistics are those of the whole batch"
    },
    "trainable": {"": "training=False in the call, which freezes a layer"},
    "track_running_stats": {"": "nothing instead, and drop the state that apply returns"},
    "fused": {"": "nothing instead: what can be fused is"},
    "renorm": {"": "BatchRenorm(BatchNorm(...))"},
    "virtual_batch_size": {"": "GhostBatchNorm(BatchNorm(...), {value})"},
    "name": {"": "nothing instead: the layer is a value and has no variables of its own"},
    "rngs": {"": "nothing instead, or key=... in the call of init"},
    "key": {"": "key=... in the call of init"},
}
# What `answer_to` says of arguments that a function cannot do without.
_MISSING = {
    "num_features": "the number of features, which is x.shape[-1] for channels last",
    "rngs": "rngs=nnx.Rngs(0), as for every layer of NNX",
    "training": "training=True to normalize with the statistics of the batch, or "
    "training=False for the running ones",
    "normalizer": "a normalizer, such as jaxbn.BatchNorm()",
}


# The first parameter of what wraps a normalizer.
_HOLD_A_NORMALIZER = (["bn"], ["inner"], ["normalizer"])
_OF_APPLY = ["weights", "residual", "adjustment", "momentum"]
_OF_INIT = ["scale_init", "bias_init", "mean_init", "var_init", "key"]
# In Python's words and, of a function that was called further down, in ours.
_UNKNOWN = re.compile(r"(?:unexpected keyword argument '|has no argument )(\w+)")


def answer_to(
    function: Any, error: TypeError, given: tuple[Any, ...], named: Mapping[str, Any]
) -> str | None:
    """Returns what to say to a call of `function` that raised `error`, or None.

    Python's error is read rather than the arguments, so that a call which is right costs
    nothing.
    """
    parameters = list(inspect.signature(function).parameters.values())
    name = function.__name__
    if parameters[0].name == "self":
        owner = type(given[0]).__name__
        name = owner if name == "__init__" else f"{owner}.{name}"
        parameters, given = parameters[1:], given[1:]
    collects = parameters[0].VAR_KEYWORD, parameters[0].VAR_POSITIONAL
    known = [each.name for each in parameters if each.kind not in collects]
    if len(known) < len(parameters):
        # What it hands on are the words of `apply` or `init`.
        known += _OF_APPLY if {"x", "inputs"} & {*known} else _OF_INIT
    ordered = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    # A function that hands keywords on learns of a foreign one from within.
    found = _UNKNOWN.search(str(error))
    if found and found[1] in named and found[1] not in known:
        return _unknown_word(name, found[1], named[found[1]], known)
    if len(given) > len(ordered) and "positional argument" in str(error):
        return _too_many(name, given, ordered, known)
    if str(error).startswith(f"{function.__qualname__}()"):
        needed = [each.name for each in parameters if each.default is each.empty]
        lacking = [
            each
            for each in needed
            if each in known and each not in named and each not in ordered[: len(given)]
        ]
        # Given under another name, to a function that hands on what it does not know.
        for word in named:
            if word in _ANSWERS and word not in known:
                return _unknown_word(name, word, named[word], known)
        return _missing(name, lacking) if lacking else None
    if given and _is_size(given[0]) and ordered[:1] in _HOLD_A_NORMALIZER:
        return (
            f"{name} takes a normalizer first, got {given[0]}. Write "
            f"{name}(jaxbn.BatchNorm(), ...), and give the number of features to init, or "
            "after it to a module of NNX."
        )
    return None


def not_a_function(name: str) -> str:
    """Returns the error of a call of the layer itself, of a class called `name`."""
    return (
        f"{name} is a value, which has no params and is no function, got a call. Write "
        "params, state = bn.init(num_features) once, and then y, state = bn.apply(params, "
        "state, x, training=True); a layer to be called is jaxbn.linen.BatchNorm or "
        "jaxbn.nnx.BatchNorm."
    )


def _unknown_word(name: str, word: str, value: Any, known: list[str]) -> str:
    shown = _shown(value)
    fact = f"{name} has no argument {word}, got {word}={shown}."
    for parameter, answer in _ANSWERS.get(word, {}).items():
        if parameter in known or not parameter:
            return f"{fact} Write {answer.format(word=word, value=shown)}."
    near = difflib.get_close_matches(word, known, 1)
    if near:
        return f"{fact} Write {near[0]}={shown}."
    return f"{fact} Choose from {', '.join(known)}."


def _too_many(
    name: str, given: tuple[Any, ...], ordered: list[str], known: list[str]
) -> str:
    takes = f"only {', '.join(ordered)} by position" if ordered else "its settings by name"
    fact = f"{name} takes {takes}, got {len(given)} by position: "
    fact += f"{', '.join(map(_shown, given))}."
    if _is_size(given[0]) and not ordered:
        return (
            f"{fact} Write params, state = {name}(...).init({given[0]}), since the number "
            "of features goes to init."
        )
    others = [each for each in known if each not in ordered]
    return f"{fact} Write the others by name: {', '.join(others) or 'there are none'}."


def _missing(name: str, lacking: list[str]) -> str:
    wanted = "; and ".join(_MISSING.get(each, f"{each}=...") for each in lacking)
    return f"{name} lacks the argument {' and '.join(lacking)}, got none. Give it {wanted}."


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """Returns a value as it is written, if that is short."""
    simple = value is None or isinstance(value, (bool, int, float, str, tuple))
    text = repr(value) if simple else "..."
    return text if len(text) < 40 else "..."
