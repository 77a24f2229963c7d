"""Bytes that the kernels of a compiled program read and write, from its text."""

import dataclasses
import math
import re

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
# What makes no kernel.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all",
    "opt-barrier", "partition-id", "replica-id",
}  # fmt: skip
_ARRAY = re.compile(rf"({'|'.join(BYTES)})\[([0-9,]*)\]")
_LINE = re.compile(r"\s*(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_HEAD = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MATMULS = re.compile("cublas|cudnn|gemm|conv")


@dataclasses.dataclass
class Kernel:
    """A kernel: what it is called, the bytes that it moves, and whether it multiplies."""

    name: str
    read: int
    written: int
    matmul: bool


@dataclasses.dataclass
class _Instruction:
    name: str
    type: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


_Computations = dict[str, list[_Instruction]]


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of the entry computation and of what it calls.

    Args:
        text: The optimised program, as `compiled.as_text()` gives it.
    """
    computations, entry = _parse(text)
    return _kernels(computations, entry)


def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry, current = "", None
    for line in text.split("\n"):
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            root, name, kind, op, rest = found.groups()
            current.append(_Instruction(name, kind, op, rest, bool(root)))
    return computations, entry


def _size(type_text: str) -> int:
    return sum(
        BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in _ARRAY.findall(type_text)
    )


def _kernels(computations: _Computations, name: str) -> list[Kernel]:
    body = {each.name: each for each in computations[name]}
    found = []
    for each in body.values():
        if each.op in _FREE or each.op.endswith("-done") or _is_returned_copy(body, each):
            continue
        called = _CALLED.findall(each.rest)
        if each.op in ("call", "while", "async-start"):
            for inner in called:
                found += _kernels(computations, inner)
        elif each.op == "conditional" and (listed := _BRANCHES.search(each.rest)):
            branches = re.findall(r"%([\w.\-]+)", listed[1])
            ways = [_kernels(computations, branch) for branch in branches]
            found += max(ways, key=lambda way: sum(k.read + k.written for k in way))
        else:
            fused = computations[called[0]] if each.op == "fusion" else []
            found.append(_kernel(body, each, fused))
    return found


def _kernel(body, each: _Instruction, fused: list[_Instruction]) -> Kernel:
    operands = list(dict.fromkeys(each.operands))
    sizes = {name: _size(body[name].type) for name in operands if name in body}
    if fused:
        for number, name in enumerate(each.operands):
            if each.operands.count(name) == 1:
                sizes[name] = _read_by(fused, number, sizes[name])
    ops = {each.op, *(inner.op for inner in fused)}
    target = re.search(r'custom_call_target="([^"]+)"', each.rest)
    matmul = bool(ops & {"dot", "convolution"} or (target and _MATMULS.search(target[1])))
    return Kernel(each.name, sum(sizes.values()), _size(each.type), matmul)


def _is_returned_copy(body, each: _Instruction) -> bool:
    """Tells whether an argument is copied only because it is a result too.

    Where a program is cut into forward and backward, x is such a result of the forward
    part; within one program it would not be copied.
    """
    if each.op != "copy" or body[each.operands[0]].op != "parameter":
        return False
    return any(
        user.root and (user is each or (user.op == "tuple" and each.name in user.operands))
        for user in body.values()
    )


def _read_by(fused: list[_Instruction], number: int, whole: int) -> int:
    """Returns the bytes that a fusion reads of an operand: fewer where it slices it."""
    names = [
        each.name
        for each in fused
        if each.op == "parameter" and each.rest.startswith(f"{number})")
    ]
    sliced = 0
    for name in names:
        for user in fused:
            if name not in user.operands:
                continue
            if user.op == "bitcast":
                names.append(user.name)
            elif user.op in ("slice", "dynamic-slice"):
                sliced += _size(user.type)
            else:
                return whole
    return min(whole, sliced)
