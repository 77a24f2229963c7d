"""The layer of PyTorch, in the memory format that it is fastest in for a layout."""

import math
from typing import Any

from tests.benchmarks.cases import Case
from tests.benchmarks.layers import EPSILON, MOMENTUM, UnfitError


class TorchProgram:
    """A pass of PyTorch; the same calls as `passes.Program` has."""

    temp = kernels = None

    def __init__(self, case: Case):
        import torch

        if case.kind != "layer":
            raise UnfitError("nets are compared within JAX")
        self._torch, self._case = torch, case
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._x, self._dy, *self._added = map(self._tensor, case.data())
        layer = torch.nn.BatchNorm2d if len(case.shape) == 4 else torch.nn.BatchNorm1d
        self.layers = case.depth
        # PyTorch's momentum is that of the batch.
        self._layers = torch.nn.ModuleList(
            layer(case.shape[case.axis], EPSILON, 1 - MOMENTUM, device=self._device)
            for _ in range(case.depth)
        ).train(case.mode != "inference")
        self._inputs: list[Any] = [self._x, *self._layers.parameters(), *self._added]
        for tensor in self._inputs:
            tensor.requires_grad_(case.mode == "gradient")
        y, dx = self._call()
        self.check = [_magnitude(tensor) for tensor in (y, dx) if tensor is not None]

    def times(self, calls: int) -> None:
        """Runs the pass so many times, and returns when the last is finished."""
        for _ in range(calls):
            self._call()
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def _tensor(self, array):
        shape = self._case.shape
        drawn = self._torch.from_numpy(array).to(
            self._device, getattr(self._torch, self._case.dtype)
        )
        times = -(-math.prod(shape) // drawn.numel())
        tensor = drawn.repeat(times)[: math.prod(shape)].reshape(shape)
        # A view of channels last is what PyTorch calls torch.channels_last.
        return tensor.permute(0, 3, 1, 2) if self._case.layout == "NHWC" else tensor

    def _forward(self):
        y = self._x
        for layer in self._layers:
            y = layer(y)
            for tensor in self._added:
                y = y + tensor
            y = self._torch.relu(y) if self._case.relu else y
        return y

    def _call(self):
        if self._case.mode != "gradient":
            with self._torch.no_grad():
                return self._forward(), None
        y = self._forward()
        return y, self._torch.autograd.grad(y, self._inputs, self._dy)[0]


def _magnitude(tensor) -> float:
    return tensor.detach().float().abs().mean().item()
