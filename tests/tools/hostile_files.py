"""Reads broken and hostile files of every format: arrays or one clear error, and no harm.

`python -m tests.tools.hostile_files [COUNT]` reads 2,000 of them in a process of limited
memory and time, and prints a table of what came out; it fails on the first that did harm.
"""

import dataclasses
import io
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxbn import convert
from tests.tools.sample_files import INSTALLED, read, sample

MAX_BYTES = 10_000_000
# What reading one hostile file may take, its libraries being imported.
MOST_MEMORY, MOST_SECONDS = 600 * 2**20, 20.0


class Payload:
    """What a pickle may do: this one makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@dataclasses.dataclass
class Attack:
    """A file or folder of one format, and what is done to it."""

    rng: np.random.Generator
    path: Path
    made: Path

    def bytes_of(self) -> Path:
        """Returns the file to be mutated: itself, or one of those in the folder."""
        if self.path.is_file():
            return self.path
        files = sorted(file for file in self.path.rglob("*") if file.is_file())
        return files[self.rng.integers(len(files))]

    def change(self, edit: Callable[[bytearray], bytes | bytearray]) -> None:
        file = self.bytes_of()
        file.write_bytes(edit(bytearray(file.read_bytes())))

    def truncate(self) -> None:
        self.change(lambda content: content[: self.rng.integers(len(content) + 1)])

    def flip(self, within: int | None = None) -> None:
        def edit(content: bytearray) -> bytearray:
            end = min(len(content), within or len(content))
            for place in self.rng.integers(max(end, 1), size=self.rng.integers(1, 9)):
                if content:
                    content[place] ^= 1 << int(self.rng.integers(8))
            return content

        self.change(edit)

    def flip_header(self) -> None:
        self.flip(400)

    def huge_numbers(self) -> None:
        """Writes digits or bytes that stand for large sizes over some of the header."""

        def edit(content: bytearray) -> bytearray:
            for place in self.rng.integers(max(len(content), 1), size=3):
                content[place : place + 4] = (b"9999", b"\xff\xff\xff\x7f")[place % 2]
            return content

        self.change(edit)

    def insert(self) -> None:
        def edit(content: bytearray) -> bytearray:
            place = int(self.rng.integers(len(content) + 1))
            content[place:place] = self.rng.bytes(int(self.rng.integers(1, 40)))
            return content

        self.change(edit)

    def swap_header(self) -> None:
        """Puts the beginning of a file of another format over that of this one."""
        other = INSTALLED[self.rng.integers(len(INSTALLED))]
        with tempfile.TemporaryDirectory() as folder:
            path = sample(other, Path(folder))
            head = Attack(self.rng, path, self.made).bytes_of().read_bytes()
        self.change(lambda content: head[:16] + content[16:])

    def zip_bomb(self) -> None:
        """Adds a member that unpacks to much more, under a path that leads out."""
        self._as_zip("../../escaped.npy", b"\0" * 20_000_000)

    def zip_of_pickle(self) -> None:
        names = ("archive/data.pkl", "payload.npy", "model.weights.h5")
        self._as_zip(names[self.rng.integers(3)], pickle.dumps(Payload(self.made), 2))

    def zip_of_link(self) -> None:
        member = zipfile.ZipInfo("archive/data/0")
        member.external_attr = 0o120777 << 16
        self._as_zip(member, b"/etc/passwd")

    def _as_zip(self, name: str | zipfile.ZipInfo, member: bytes) -> None:
        buffer = io.BytesIO()
        source = self.bytes_of()
        if zipfile.is_zipfile(source):
            buffer.write(source.read_bytes())
        with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, member)
        source.write_bytes(buffer.getvalue())

    def pickle_bomb(self) -> None:
        """A pickle of lists in lists, which hold a billion entries when walked through."""
        tree: object = []
        for _ in range(30):
            tree = [tree, tree]
        self.change(lambda _: pickle.dumps({"a": tree, "b": Payload(self.made)}, 2))

    def deep(self) -> None:
        """Nests a hundred thousand levels, as JSON, msgpack or a pickle do."""
        nests = (b"[" * 100_000, b"\x81\xa1a" * 100_000, b"\x80\x02" + b"]" * 100_000)
        nest = nests[self.rng.integers(3)]
        self.change(lambda content: content[: self.rng.integers(3) * 8] + nest)

    def link(self) -> None:
        """Puts a link in the place of the file: to itself, or to an endless device."""
        file = self.bytes_of()
        file.unlink()
        file.symlink_to((file.name, "/dev/zero", "none")[self.rng.integers(3)])

    def pipe(self) -> None:
        file = self.bytes_of()
        file.unlink()
        os.mkfifo(file)


KINDS = (
    *("truncate", "flip", "flip", "flip_header", "flip_header", "huge_numbers", "insert"),
    *("swap_header", "zip_bomb", "zip_of_pickle", "zip_of_link", "pickle_bomb", "deep"),
    *("link", "pipe"),
)


def attacks(count: int) -> Iterator[tuple[str, str, int]]:
    """Yields format, kind and seed, so that every pair of them comes as often."""
    pairs = [(name, kind) for kind in KINDS for name in INSTALLED]
    for seed in range(count):
        yield (*pairs[seed % len(pairs)], seed)


def outcome(name: str, kind: str, seed: int, folder: Path) -> str:
    """Returns "arrays" or "refused", or raises if reading did anything else."""
    made = folder / "made"
    inside = folder / "in"
    inside.mkdir()
    path = sample(name, inside)
    getattr(Attack(np.random.default_rng(seed), path, made), kind)()
    before = {file: file.lstat().st_mtime_ns for file in folder.rglob("*")}
    begin = time.monotonic()
    arrays, message = _read(name, path)
    assert time.monotonic() - begin < MOST_SECONDS, "it took too long"
    assert not message or (str(folder) in message and len(message) < 1000), message
    assert all(array.dtype.kind in "biufcV" for array in arrays)
    assert sum(array.nbytes for array in arrays) <= MAX_BYTES
    after = {file: file.lstat().st_mtime_ns for file in folder.rglob("*")}
    assert before == after, f"something was written: {after.keys() ^ before.keys()}"
    return "refused" if message else "arrays"


def _read(name: str, path: Path) -> tuple[list[np.ndarray], str]:
    """Returns the arrays of a file, or why there are none."""
    try:
        return _leaves(read(name, path, max_bytes=MAX_BYTES).arrays), ""
    except (convert.CheckpointError, FileNotFoundError) as error:
        return [], str(error)
    except ImportError:
        # A file may turn into one of a format whose package is not here.
        return [], str(path)


def _leaves(tree: object) -> list[np.ndarray]:
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _leaves(part)]
    return [np.asarray(tree)]


def limit_memory() -> None:
    """Lets this process grow by no more than what one file may ask for."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_MEMORY,) * 2)


def main(count: int, first: int = 0) -> None:
    """Reads `count` files and prints how many of each format gave what."""
    with tempfile.TemporaryDirectory() as folder:
        for name in INSTALLED:  # imports all libraries before the limit
            read(name, sample(name, Path(tempfile.mkdtemp(dir=folder))))
        limit_memory()
        results: Counter[tuple[str, str]] = Counter()
        begin = time.monotonic()
        for name, kind, seed in list(attacks(count))[first:]:
            print(name, kind, seed, file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                results[name, outcome(name, kind, seed, Path(inner))] += 1
    for name in INSTALLED:
        told = (f"{results[name, result]} {result}" for result in ("arrays", "refused"))
        print(f"{name}: {', '.join(told)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    print(f"{sum(results.values())} files, {time.monotonic() - begin:.0f} s, {peak} MiB")


if __name__ == "__main__":
    if sys.argv[2:] == ["--here"]:
        main(int(sys.argv[1]))
    else:
        number = sys.argv[1] if sys.argv[1:] else "2000"
        command = [sys.executable, "-m", "tests.tools.hostile_files", number, "--here"]
        sys.exit(subprocess.run(command, timeout=3600).returncode)
