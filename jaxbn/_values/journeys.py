"""How values print, and how they travel: pickled, copied and printed, they stay equal.

A function that is found under its name travels by that name, and arrives as the same
object. JAX's own are wrapped in `custom_jvp` and `jit`, which do not pickle.
"""

import copyreg
import dataclasses
import functools
import pkgutil
import sys
from typing import Any

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

    def __call__(self) -> None:
        """Nothing: `functools.partial` holds what can be called."""

    def __reduce__(self) -> Any:
        return pkgutil.resolve_name, (self.name,)


def _by_name(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _by_name(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_by_name, state))
    if type(state) is functools.partial:
        words = _by_name(state.keywords)
        return functools.partial(_by_name(state.func), *_by_name(state.args), **words)
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
    name = name_of(value)
    return repr(value) if name is None else name.replace(":", ".")


def _same(value: Any, default: Any) -> bool:
    if default is dataclasses.MISSING or isinstance(value, (jax.Array, np.ndarray)):
        return False
    if isinstance(value, np.dtype) and default is not None:
        return value == np.dtype(default)
    return type(value) is type(default) and value == default
