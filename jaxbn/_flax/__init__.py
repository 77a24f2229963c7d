"""What the layers for both APIs of Flax share; imported first, so that it may miss Flax."""

try:
    import flax  # noqa: F401
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"jaxbn.linen and jaxbn.nnx need the package {error.name}, which is not installed. "
        "Run pip install 'jaxbn[flax]'.",
        name=error.name,
    ) from error
