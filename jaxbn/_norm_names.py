"""What libraries call the arrays and the layers of normalization: one table of names."""

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
# Parts of the names of layers, as regular expressions for names of any case.
NORM_LAYERS = r"batch_?norm|norm|(?<![a-z])bn(?![a-z])"
LINEAR_LAYERS = r"conv_?transpose|conv|dense|linear|(?<![a-z])fc(?![a-z])"


def names_of_role(role: str) -> tuple[str, ...]:
    """Returns the names that libraries give the arrays of a role, the most exact first."""
    libraries = (JAXBN, TORCH, TENSORFLOW, HAIKU)
    return tuple(dict.fromkeys(names[role] for names in libraries if role in names))
