"""The command lines of the examples that train, and errors about their values."""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from _data import NUM_TRAIN


def check(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    demands: Iterable[tuple[str, bool, str]],
) -> None:
    """Exits with a message about the first option that is not as demanded.

    A demand is the name of an option, whether its value is valid, and what it must be.
    """
    for option, valid, demand in demands:
        if not valid:
            value = getattr(args, option.replace("-", "_"))
            parser.error(f"argument --{option}: must be {demand}, got {value}")


def of_mnist(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a sigmoid network on MNIST, without and with jaxbn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=12, help="passes over the training images")
    add("--batch-size", type=int, default=60, help="images in one step")
    add("--learning-rate", type=float, default=2.0, help="of SGD in the first step")
    add("--momentum", type=float, default=0.9, help="decay of the running statistics")
    add("--seed", type=int, default=0, help="of the weights and the order of the images")
    add("--out", type=Path, default=Path("mnist.png"), help="file for the picture")
    args = parser.parse_args(argv)
    picture = args.out.suffix.lower() == ".png" and args.out.parent.is_dir()
    sizes = f"between 2 and {NUM_TRAIN}, the number of training images"
    demands = (
        ("epochs", args.epochs >= 1, "at least 1"),
        ("batch-size", 2 <= args.batch_size <= NUM_TRAIN, sizes),
        ("learning-rate", 0 < args.learning_rate < math.inf, "positive and finite"),
        ("momentum", 0 <= args.momentum <= 1, "between 0 and 1"),
        ("seed", 0 <= args.seed < 2**32, "between 0 and 2**32 - 1"),
        ("out", picture, "a .png file in a folder that exists"),
    )
    check(parser, args, demands)
    return args


def of_swa(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Averages the weights of a network on MNIST, with jaxbn.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=16, help="passes over the training images")
    add("--learning-rate", type=float, default=20.0, help="of SGD, in all steps")
    add("--seeds", type=int, default=3, help="how many trainings, with seeds from 0 on")
    args = parser.parse_args(argv)
    demands = (
        ("epochs", args.epochs >= 1, "at least 1"),
        ("learning-rate", 0 < args.learning_rate < math.inf, "positive and finite"),
        ("seeds", args.seeds >= 1, "at least 1"),
    )
    check(parser, args, demands)
    return args


def of_resnet(argv: Sequence[str] | None, what: str, folder: str):
    parser = argparse.ArgumentParser(
        description=f"Trains a small ResNet on MNIST with {what}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=15, help="passes over the training images")
    add("--batch-size", type=int, default=50, help="images in one step")
    add("--learning-rate", type=float, default=0.1, help="of SGD in the first step")
    add("--seed", type=int, default=0, help="of weights, order, shifts and dropout")
    add("--checkpoints", type=Path, default=Path(folder), help="folder of checkpoints")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    args = parser.parse_args(argv)
    demands = (
        ("epochs", args.epochs >= 1, "at least 1"),
        ("batch-size", 2 <= args.batch_size <= NUM_TRAIN, f"between 2 and {NUM_TRAIN}"),
        ("learning-rate", 0 < args.learning_rate < math.inf, "positive and finite"),
        ("seed", 0 <= args.seed < 2**32, "between 0 and 2**32 - 1"),
    )
    check(parser, args, demands)
    return args


def of_devices(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Returns epochs, batch_size, seed, and `devices` as a list; a CPU plays any number."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--devices", type=int, default=8, help="how many share a batch")
    add("--epochs", type=int, default=4, help="passes over the training images")
    add("--batch-size", type=int, default=120, help="images in one step, on all devices")
    add("--seed", type=int, default=0, help="of the weights and the order of the images")
    args = parser.parse_args(argv)
    for option, least in (("devices", 1), ("epochs", 1), ("batch-size", 1), ("seed", 0)):
        value = getattr(args, option.replace("-", "_"))
        if value < least:
            parser.error(f"argument --{option}: must be at least {least}, got {value}")
    jax.config.update("jax_num_cpu_devices", args.devices)
    if len(jax.devices()) < args.devices:
        parser.error(
            f"argument --devices: there are {len(jax.devices())}, got {args.devices}. "
            "Set JAX_PLATFORMS=cpu to let the CPU play them."
        )
    args.devices = jax.devices()[: args.devices]
    return args


def of_multihost(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains on MNIST over many processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--processes", type=int, help="start so many here; with --process-id: all there are"
    )
    add("--coordinator", metavar="HOST:PORT", help="of process 0, with --process-id")
    add("--process-id", type=int, help="be this process, and start none")
    add("--epochs", type=int, default=4, help="passes over the training images")
    add("--batch-size", type=int, default=120, help="images in one step, of all processes")
    add("--seed", type=int, default=0, help="of the weights and the order of the images")
    folder = Path("multihost_checkpoints")
    add("--checkpoints", type=Path, default=folder, help="folder, written after each epoch")
    add("--resume", action="store_true", help="go on after the last checkpoint")
    add("--timeout", type=int, default=20, help="seconds until a silent process is dead")
    add("--limit", type=int, default=1800, help="seconds for all, where --processes starts")
    args = parser.parse_args(argv)
    least = {"processes": 1, "process-id": 0, "epochs": 1, "batch-size": 1, "seed": 0}
    least |= {"timeout": 1, "limit": 1}
    for option, minimum in least.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None and value < minimum:
            parser.error(f"argument --{option}: must be at least {minimum}, got {value}")
    by_hand = [args.coordinator is not None, args.process_id is not None]
    if any(by_hand) and not (all(by_hand) and args.processes is not None):
        parser.error("--coordinator, --process-id and --processes go together")
    if any(by_hand) and args.process_id >= args.processes:
        parser.error(
            f"argument --process-id: must be below --processes {args.processes}, "
            f"got {args.process_id}"
        )
    if not args.resume and any(args.checkpoints.glob("*")):
        parser.error(
            f"there are checkpoints in {args.checkpoints} already: go on with --resume, "
            "remove the folder, or name another with --checkpoints"
        )
    return args
