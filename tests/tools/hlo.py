"""Reads the text of a compiled program: its computations, and which of them always run."""

import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([0-9,]*)\]")
_LINE = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.\-]+)")
_BRANCHES = (
    re.compile(r"branch_computations=\{([^}]*)\}"),
    re.compile(r"true_computation=(%[\w.\-]+), false_computation=%[\w.\-]+"),
    re.compile(r"false_computation=(%[\w.\-]+)"),
)
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass
class Instruction:
    """A line of a program: `name = type op(rest`."""

    name: str
    type: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    @property
    def called(self) -> list[str]:
        """The computations of a fusion, a call, or the body of a loop."""
        return _CALLED.findall(self.rest)

    @property
    def branches(self) -> list[str]:
        """The computations of which a conditional runs one."""
        found = [m[1] for pattern in _BRANCHES for m in pattern.finditer(self.rest)]
        return re.findall(r"%([\w.\-]+)", " ".join(found))

    @property
    def bytes(self) -> int:
        """Those of the result."""
        return sum(
            BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
            for kind, sizes in _ARRAY.findall(self.type)
        )

    @property
    def cycles(self) -> int:
        """What the compiler for a TPU estimates; 0 where it says nothing."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else 0


class Program:
    """The computations of a compiled program, by name; `entry` names the first."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, current = "", None
        for line in text.split("\n"):
            if head := _HEAD.match(line):
                current = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (found := _LINE.match(line)):
                root, name, kind, op, rest = found.groups()
                current.append(Instruction(name, kind, op, rest, bool(root)))

    def always(self, name: str | None = None) -> Iterator[Instruction]:
        """Yields what runs in any case: nothing of the branches of a conditional."""
        for each in self.computations[name or self.entry]:
            yield each
            if each.op in ("call", "while", "async-start"):
                for inner in each.called:
                    yield from self.always(inner)

    def sometimes(self) -> Iterator[Instruction]:
        """Yields what runs in a branch of a conditional."""
        for each in self.always():
            for branch in each.branches:
                yield from self.always(branch)
