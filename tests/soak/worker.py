"""One process of a training: `... worker PLAN RANK PORT FOLDER MODEL_PARALLEL`."""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import convert
from tests.laws.test_laws import change
from tests.soak.plan import (
    DEVICES,
    LAYERS,
    PROCESSES,
    Plan,
    from_arrays,
    last_step,
    to_arrays,
)


def step_of(plan: Plan, mesh: Any) -> Any:
    """Returns the jitted step `(variables, x, weights, dy) -> variables`."""
    by_axis = plan.style == "shard_map"
    layer = change(plan.layer, axis_name="d") if by_axis else plan.layer

    def step(variables, x, weights, dy):
        after = []
        for (params, state), cotangent in zip(variables, dy, strict=True):

            def loss(params, x=x, state=state, cotangent=cotangent):
                y, new = layer.apply(params, state, x, True, weights=weights)
                return (y * cotangent).sum() / plan.rows, (y, new)

            gradients, (y, state) = jax.grad(loss, has_aux=True)(params)
            move = lambda param, gradient: param - plan.rate * gradient
            after.append((jax.tree.map(move, params, gradients), state))
            x = jnp.tanh(y)
        return after

    if not by_axis:
        return jax.jit(step)
    rows = P("d")
    specs = P(), rows, rows if plan.weighted else None, P(None, "d")
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P()))


def main(arguments: list[str]) -> None:
    text, rank, port, folder, parallel = arguments
    plan, folder = Plan(**json.loads(text)), Path(folder)
    # A peer that was killed leaves this process in a collective for ever.
    faulthandler.dump_traceback_later(120, exit=True)
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(rank))
    assert jax.device_count() == DEVICES
    shape = DEVICES // int(parallel), int(parallel)
    mesh = jax.make_mesh(shape, ("d", "m"), axis_types=(AxisType.Auto,) * 2)

    def place(array, *spec):
        array = np.asarray(array)
        sharding = NamedSharding(mesh, P(*spec))
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    start = last_step(folder)
    variables: Any = [plan.layer.init(plan.features) for _ in range(LAYERS)]
    if start:
        variables = from_arrays(variables, convert.load(folder / f"{start}.npz"))
    spec = ("m",) if int(parallel) > 1 else ()
    variables = jax.tree.map(lambda array: place(array, *spec), variables)
    step = step_of(plan, mesh)
    for index in range(start, plan.steps):
        faulthandler.dump_traceback_later(120, exit=True)
        x, weights, dy = plan.batch(index)
        weights = None if weights is None else place(weights, "d")
        batch = place(x, "d"), weights, place(dy, None, "d")
        variables = step(variables, *batch)
        done = index + 1
        if done % plan.every == 0 or done == plan.steps:
            whole = multihost_utils.process_allgather(variables, tiled=True)
            if rank == "0":
                # Named last, so that a file with its name is whole.
                unnamed = folder / "unnamed.npz"
                convert.save(unnamed, to_arrays(whole))
                os.replace(unnamed, folder / f"{done}.npz")
        if rank == "0":
            print(done, flush=True)
    multihost_utils.sync_global_devices("the end")


if __name__ == "__main__":
    main(sys.argv[1:])
