"""Bytes that jaxbn accesses on a TPU v5e, as XLA counts them in the program for one.

    python -m tests.benchmarks --bytes-tpu

needs libtpu (pip install 'jax[tpu]') and no TPU.
"""

import math
from typing import Any

SHAPE = (64, 56, 56, 256)


def compiler():
    """Returns a function that compiles a function of arguments for one core of a v5e."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tests.benchmarks.deviceless import on_device

    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = Mesh(np.array(described.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def compile(function, arguments):
        jitted: Any = jax.jit(function)
        return jitted.lower(*on_device(arguments, sharding)).compile()

    return compile


def main() -> None:
    """Prints the counts; its environment must be as `environment` returns it."""
    import jax.numpy as jnp

    from tests.benchmarks.deviceless import Programs, print_rows

    compile = compiler()

    def count(peer, dtype, relu):
        programs = Programs(peer, SHAPE, dtype, relu)
        unit = math.prod(SHAPE) * jnp.dtype(dtype).itemsize
        counts = {}
        for name, program in (("forward", "training"), ("gradient", "squares")):
            costs = compile(*getattr(programs, program)()).cost_analysis() or {}
            counts[name] = costs["bytes accessed"] / unit
        return counts

    print_rows(count)


def environment() -> dict[str, str]:
    """Returns the variables with which libtpu does not look for a machine with TPUs."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }


if __name__ == "__main__":
    main()
