"""Reads what flax.serialization writes: nested dicts of arrays in msgpack."""

from typing import BinaryIO

from jaxbn.convert._readers.contents import Contents


def read_msgpack(file: BinaryIO, contents: Contents) -> None:
    """Adds the nested dicts of a file, or raises."""
    try:
        from flax.serialization import msgpack_restore
    except ImportError as error:
        raise ImportError(
            "a msgpack file of Flax needs Flax, which is not installed. Run "
            "pip install 'jaxbn[flax]'."
        ) from error
    content = file.read()
    tree = msgpack_restore(content)
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__} where dicts were expected")
    arrays = contents.numeric(tree)
    contents.arrays |= {str(name): part for name, part in arrays.items()}
