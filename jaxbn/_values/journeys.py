"""How values print, and how they travel: pickled, copied and printed, they stay equal.

A function that is found under its name travels by that name, and arrives as the same
object. JAX's own are wrapped in `custom_jvp` and `jit`, which do not pickle.
"""

import copyreg
import dataclasses
import functools
import pkgutil
import sys
import weakref
from typing import Any, cast

import jax
import numpy as np

# Where a function is looked for before the module that defines it, which may be private.
_PUBLIC = ("jax.nn", "jax.numpy", "jax.lax")


class Value:
    """A frozen dataclass that prints what differs from its defaults, and travels whole."""

    def __repr__(self) -> str:
        return shown(self)

    def __reduce__(self) -> Any:
        return reduced(self)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


def shown(value: Any) -> str:
    """Returns a dataclass as the call that makes an equal one."""
    fields = dataclasses.fields(value)
    given = ((f, getattr(value, f.name)) for f in fields if f.repr)
    return as_call(type(value).__qualname__, ((f.name, v, f.default) for f, v in given))


def as_call(kind: str, fields: Any) -> str:
    """Returns a call of `kind` with those of the `(name, value, default)` that differ."""
    words = [f"{n}={_word(v)}" for n, v, default in fields if not _same(v, default)]
    return f"{kind}({', '.join(words)})"


def reduced(value: Any) -> Any:
    """Returns what `__reduce__` of an object does, with named functions by their names."""
    return copyreg.__newobj__, (type(value),), _by_name(value.__getstate__())  # pyright: ignore


def copied(value: Any) -> Any:
    """Returns a shallow copy of an object that `reduced` pickles."""
    other = copyreg.__newobj__(type(value))  # pyright: ignore[reportAttributeAccessIssue]
    state = value.__getstate__()
    if hasattr(other, "__setstate__"):
        other.__setstate__(state)
    elif state is not None:
        other.__dict__.update(state)
    return other


class _Named:
    """Stands for a function in a pickle, and becomes that function when it is read."""

    def __init__(self, name: str):
        self.name = name

    def __reduce__(self) -> Any:
        return pkgutil.resolve_name, (self.name,)


class _Partial:
    """Stands for a partial in a pickle, and becomes the one of all equal partials."""

    def __init__(self, function: Any, args: Any, keywords: Any):
        self.parts = function, args, keywords

    def __reduce__(self) -> Any:
        return _partial, self.parts


_PARTIALS: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def as_function(name: str, function: Any) -> Any:
    """Returns a function or None as it is, but equal partials as one object.

    Python compares partials by identity, so layers of equal settings would be unequal and
    be compiled again. Partials of arrays, which have no hash, stay apart.
    """
    if function is not None and not callable(function):
        raise TypeError(
            f"{name} must be a function of an array, got {function!r}. Pass "
            "jax.nn.relu or the like, or None."
        )
    if type(function) is not functools.partial:
        return function
    partial = cast("functools.partial[Any]", function)
    words = sorted(partial.keywords.items())
    values = *partial.args, *(value for _, value in words)
    key = partial.func, len(partial.args), tuple(word for word, _ in words), values
    try:
        # By type too: 1, 1.0 and True are equal, and do not compute the same.
        return _PARTIALS.setdefault((key, tuple(map(type, values))), function)
    except TypeError:
        return function


def _partial(function: Any, args: Any, keywords: Any) -> Any:
    return as_function("", functools.partial(function, *args, **keywords))


def _by_name(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _by_name(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_by_name, state))
    if type(state) is functools.partial:
        return _Partial(*map(_by_name, (state.func, state.args, state.keywords)))
    name = name_of(state)
    return state if name is None else _Named(name)


def name_of(function: Any) -> str | None:
    """Returns the name `module:name` under which a function is found, or None."""
    if not callable(function) or isinstance(function, type):
        return None
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    own = getattr(function, "__module__", None)
    if not isinstance(name, str) or not isinstance(own, str):
        return None
    for module in (*(_PUBLIC if own.split(".")[0] == "jax" else ()), own):
        found = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is function:
            return f"{module}:{name}"
    # A jitted function has the name of what was jitted.
    others = vars(sys.modules.get(own, object)).items()
    return next((f"{own}:{name}" for name, found in others if found is function), None)


def _word(value: Any) -> str:
    if isinstance(value, np.dtype):
        return repr(value.name)
    if type(value) is functools.partial:
        words = [_word(value.func), *map(_word, value.args)]
        words += [f"{key}={_word(word)}" for key, word in value.keywords.items()]
        return f"functools.partial({', '.join(words)})"
    name = name_of(value)
    return repr(value) if name is None else name.replace(":", ".")


def _same(value: Any, default: Any) -> bool:
    if default is dataclasses.MISSING or isinstance(value, (jax.Array, np.ndarray)):
        return False
    if isinstance(value, np.dtype) and default is not None:
        return value == np.dtype(default)
    return type(value) is type(default) and value == default
