"""Bytes that jaxbn moves on an H200, counted in the program that XLA makes for one.

    python -m tests.benchmarks --bytes-h200

needs no GPU: the CUDA plugin of JAX compiles for a description of the device.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPE = (256, 56, 56, 256)

_LIBRARY = "jax_plugins/xla_cuda12/xla_cuda_plugin.so"
_DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H200 141GB HBM3e"
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""


def plugin_folder() -> Path:
    """Returns the folder of the plugin of this JAX, and installs it there if need be.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "jaxbn-benchmarks" / f"cuda12-{jax.__version__}"
    if not list(folder.glob(_LIBRARY)):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        names = ("jax-cuda12-plugin", "jax-cuda12-pjrt")
        packages = [f"{name}=={jax.__version__}" for name in names]
        print(f"Installing {' '.join(packages)} into {folder}, 0.5 GB.", file=sys.stderr)
        subprocess.run([*pip, "--target", str(folder), *packages], check=True)
    return folder


def compiler(folder: Path):
    """Returns a function that compiles a function of arguments for an H200."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxlib import xla_client

    from tests.benchmarks.deviceless import on_device

    plugin: Any = xla_client
    api = plugin.load_pjrt_plugin_dynamically("cuda", str(folder / _LIBRARY))
    topology = plugin.make_c_api_device_topology(
        api, "", target_config=_DEVICE, topology="1x1x1"
    )
    described = topologies.TopologyDescription(topology._make_compile_only_devices())
    mesh = Mesh(np.array(described.devices[:1]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def compile(function, arguments):
        jitted: Any = jax.jit(function)
        traced = jitted.trace(*on_device(arguments, sharding))
        return traced.lower(lowering_platforms=("cuda",)).compile()

    return compile


def main() -> None:
    """Prints the counts; its environment must be as `environment` returns it."""
    import jax.numpy as jnp

    from tests.benchmarks.deviceless import DEPTH, Programs, print_rows
    from tests.benchmarks.traffic import kernels

    compile = compiler(plugin_folder())

    def units(function, arguments, x):
        text = compile(function, arguments).as_text() or ""
        moved = sum(k.read + k.written for k in kernels(text) if not k.matmul)
        return moved / (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize)

    def count(peer, dtype, relu):
        programs = Programs(peer, SHAPE, dtype, relu)
        counts = {}
        for name in ("training", "forward", "backward"):
            function, arguments = getattr(programs, name)()
            counts[name] = units(function, arguments, programs.x)
        if relu:
            function, arguments = programs.blocks()
            counts["block"] = units(function, arguments, programs.x) / DEPTH
        return counts

    print_rows(count)


def environment() -> dict[str, str]:
    """Returns the variables under which a program is compiled for a device not there."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "TF_CPP_MIN_LOG_LEVEL": "3"}


if __name__ == "__main__":
    main()
