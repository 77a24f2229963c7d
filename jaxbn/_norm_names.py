"""What libraries call the arrays and the layers of normalization: one table of names."""

import re
from collections.abc import Mapping

# The role that an array plays in jaxbn, and its name in the layer of a library.
JAXBN = {
    "scale": "scale",
    "bias": "bias",
    "mean": "mean",
    "var": "var",
    "std": "std",
    "renorm_mean": "renorm_mean",
    "renorm_std": "renorm_std",
}
FLAX = {role: JAXBN[role] for role in ("scale", "bias", "mean", "var")}
TORCH = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
TENSORFLOW = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "moving_mean",
    "var": "moving_variance",
    "std": "moving_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_std": "renorm_stddev",
}
# Haiku keeps each average in a module of its own, below that of the layer.
HAIKU = {
    "scale": "scale",
    "bias": "offset",
    "mean": "mean_ema/average",
    "var": "var_ema/average",
    "count": "mean_ema/counter",
}
# Other names for the same, of MXNet and its Gluon: read, and never written.
OTHERS = {
    "scale": ("gamma",),
    "bias": ("beta",),
    "mean": ("moving_mean", "running_mean"),
    "var": ("moving_var", "running_var"),
}
# What frameworks add behind the name of a variable: tensors of TensorFlow 1, object
# checkpoints of TensorFlow 2 and Keras, variables of NNX.
ENDINGS = (":0", "/.ATTRIBUTES/VARIABLE_VALUE", "/value", "/raw_value")
# Nodes that wrappers add to the path of a layer: data parallelism, torch.compile, FSDP.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Parts of the names of layers, as regular expressions for names of any case.
NORM_LAYERS = r"batch_?norm|norm|(?<![a-z])bn(?![a-z])"
LINEAR_LAYERS = r"conv_?transpose|conv|dense|linear|(?<![a-z])fc(?![a-z])"


def names_of_role(role: str) -> tuple[str, ...]:
    """Returns the names that libraries give the arrays of a role, the most exact first."""
    libraries = (JAXBN, TORCH, TENSORFLOW, HAIKU)
    named = [names[role] for names in libraries if role in names]
    return tuple(dict.fromkeys((*named, *OTHERS.get(role, ()))))


def spellings(
    names: Mapping[str, str],
    joints: str,
    endings: tuple[str, ...] = ("",),
    others: Mapping[str, tuple[str, ...]] = OTHERS,
) -> dict[str, tuple[str, ...]]:
    """Returns how arrays of a library may be spelled, `*` being the name of the layer.

    Args:
        names: The names of the library by their roles.
        joints: The characters that join a layer and its array, the usual one first.
        endings: What may follow; the usual one first.
        others: Further names by their roles.
    """
    return {
        role: tuple(
            f"*{joint}{spelled}{ending}"
            for joint in joints
            for spelled in dict.fromkeys((name, *others.get(role, ())))
            for ending in endings
        )
        for role, name in names.items()
    }


def split_name(name: str) -> tuple[str, ...]:
    """Returns the nodes of a name that is joined by dots or slashes, without endings."""
    name = _KIND.sub("", _ENDING.sub("", name))
    # MXNet joins a layer and its array by an underscore.
    name = _JOINED.sub(r"/\1", name)
    return tuple(node for node in _SEPARATOR.split(name) if node)


def layer_of(name: str, role: str) -> str:
    """Returns the layer of an array of this role as far as its name tells, or nothing."""
    name = _JOINED.sub(r"/\1", _ENDING.sub("", name))
    for tail in names_of_role(role):
        if name.endswith(("." + tail, "/" + tail)):
            return name[: -len(tail) - 1]
    return ""


def without_wrappers(layer: str, separator: str) -> str:
    """Returns the name of a layer without the nodes of wrappers around it."""
    nodes = layer.split(separator)
    return separator.join(node for node in nodes if node not in WRAPPERS)


_SEPARATOR = re.compile(r"[./]")
_ENDING = re.compile(f"({'|'.join(map(re.escape, ENDINGS))})$")
_JOINED = re.compile(r"_(gamma|beta|(?:moving|running)_(?:mean|var|variance))$")
# MXNet tells params and statistics apart before the name.
_KIND = re.compile("^(arg|aux):")
