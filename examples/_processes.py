"""The processes of multihost.py: starting them, and ending all when one has died."""

import argparse
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

CPU_DEVICES = 2  # of every process that is started here
PEER_LOST = 3  # exit code


def take_part(
    args: argparse.Namespace, train: Callable[[argparse.Namespace], None]
) -> None:
    """Is one process of many, and never outlives the others."""
    expect_progress(10 * args.timeout)  # starting and compiling take longer than a step
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process_id,
            coordinator_bind_address=args.coordinator,
            initialization_timeout=10 * args.timeout,
            heartbeat_timeout_seconds=args.timeout,
        )
    except ValueError as error:
        raise SystemExit(
            f"multihost.py: JAX finds no other processes here ({error}) Start two on this "
            "machine with --processes 2, or give --coordinator, --processes and "
            "--process-id."
        ) from None
    try:
        train(args)
    except jax.errors.JaxRuntimeError as error:
        fact = str(error).splitlines()[0][:200]
        print(f"process {jax.process_index()}: lost a peer. {fact}", file=sys.stderr)
        leave(PEER_LOST)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        leave(1)
    jax.distributed.shutdown()
    faulthandler.cancel_dump_traceback_later()


def expect_progress(seconds: float) -> None:
    """Ends this process with a traceback unless this is called again in time.

    A collective waits for ever for a peer that is stuck, and in C++, where no exception
    of Python reaches it: faulthandler's thread does.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)


def leave(code: int) -> NoReturn:
    """Ends at once: an orderly end would wait for the peers that wait for this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(program: str, args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Starts all processes on this machine and ends when they have, or one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(CPU_DEVICES),
    }
    command = [sys.executable, program, *argv, f"--coordinator={coordinator}"]
    workers = []
    try:
        for index in range(args.processes):
            own = [*command, f"--process-id={index}"]
            workers.append(subprocess.Popen(own, env=environment))
        complaint = watch(workers, args)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if complaint:
        raise SystemExit(f"multihost.py: {complaint}")


def watch(workers: list[subprocess.Popen], args: argparse.Namespace) -> str | None:
    """Returns None when all have ended well, or else a sentence about what happened."""
    end = time.monotonic() + args.limit
    failed = False
    while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
        time.sleep(0.1)
        if not failed and any(worker.poll() for worker in workers):
            failed = True
            # The missing heartbeat ends the others before that, unless they are stuck.
            end = min(end, time.monotonic() + args.timeout + 5)
    codes = [worker.poll() for worker in workers]
    if not any(codes) and None not in codes:
        return None
    endings = (f"process {index} {describe(code)}" for index, code in enumerate(codes))
    return (
        f"the training ended early: {', '.join(endings)}. Start again with --resume to go "
        "on after the last checkpoint."
    )


def describe(code: int | None) -> str:
    if code is None:
        return "was stuck or late and is killed now"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    words = {0: "ended well", PEER_LOST: "lost a peer"}
    return words.get(code, f"ended with exit code {code}")
