"""How much XLA optimizes the programs of a test: little, where it asks for results alone.

The suite compiles twelve thousand small programs, which is most of its time. Without LLVM's
passes and the newer emitters of fusions a program compiles in a third of that; XLA's own
passes, which decide what is fused and what is reduced over devices, stay. What asks for the
digits, the memory or the text of programs says `OPTIMIZED = True` in its file.
"""

import contextlib
import functools
import os
from unittest import mock

import jax
from jax._src import compiler  # no public name sets options of all programs

FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    # Otherwise the functions of a program are shared out among 32 modules of LLVM.
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def _known_options():
    """Returns the options that this XLA knows."""
    return [option for option in FAST.items() if _is_known(option)]


def _is_known(option):
    program = jax.jit(lambda: 0, compiler_options=dict([option])).lower()
    try:
        program.compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def fast_environment():
    """Returns the variables under which another process compiles so."""
    flags = [f"--{name}={str(value).lower()}" for name, value in _known_options()]
    return {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()}


@contextlib.contextmanager
def compiled_fast():
    """Compiles what is compiled within with little optimization."""
    known, make_options = _known_options(), compiler.get_compile_options

    def options(*arguments, **keywords):
        made = make_options(*arguments, **keywords)
        made.env_option_overrides = [*known, *made.env_option_overrides]
        return made

    with mock.patch.object(compiler, "get_compile_options", options):
        yield
