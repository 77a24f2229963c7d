"""Bytes that the kernels of a compiled program read and write, from its text."""

import dataclasses
import re

from tests.tools.hlo import Instruction, Program

# What makes no kernel.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all",
    "opt-barrier", "partition-id", "replica-id",
}  # fmt: skip
_MATMULS = re.compile("cublas|cudnn|gemm|conv")


@dataclasses.dataclass
class Kernel:
    """A kernel: what it is called, the bytes that it moves, and whether it multiplies."""

    name: str
    read: int
    written: int
    matmul: bool


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of the entry computation and of what it calls.

    Args:
        text: The optimised program, as `compiled.as_text()` gives it.
    """
    program = Program(text)
    return _kernels(program, program.entry)


def _kernels(program: Program, name: str) -> list[Kernel]:
    body = {each.name: each for each in program.computations[name]}
    found = []
    for each in body.values():
        if each.op in _FREE or each.op.endswith("-done") or _is_returned_copy(body, each):
            continue
        if each.op in ("call", "while", "async-start"):
            for inner in each.called:
                found += _kernels(program, inner)
        elif each.branches:
            ways = [_kernels(program, branch) for branch in each.branches]
            found += max(ways, key=lambda way: sum(k.read + k.written for k in way))
        else:
            fusion = each.op == "fusion"
            fused = program.computations[each.called[0]] if fusion else []
            found.append(_kernel(body, each, fused))
    return found


def _kernel(body, each: Instruction, fused: list[Instruction]) -> Kernel:
    operands = list(dict.fromkeys(each.operands))
    sizes = {name: body[name].bytes for name in operands if name in body}
    if fused:
        for number, name in enumerate(each.operands):
            if each.operands.count(name) == 1:
                sizes[name] = _read_by(fused, number, sizes[name])
    ops = {each.op, *(inner.op for inner in fused)}
    target = re.search(r'custom_call_target="([^"]+)"', each.rest)
    matmul = bool(ops & {"dot", "convolution"} or (target and _MATMULS.search(target[1])))
    return Kernel(each.name, sum(sizes.values()), each.bytes, matmul)


def _is_returned_copy(body, each: Instruction) -> bool:
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


def _read_by(fused: list[Instruction], number: int, whole: int) -> int:
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
                sliced += user.bytes
            else:
                return whole
    return min(whole, sliced)
