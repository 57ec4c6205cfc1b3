"""The same matrix products for all: what is compared is architectures, not libraries of products."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hamt.cpu.linear import Linear, linear


class _Conv1D(Conv1D):
    """GPT-2's linear map, its matrix the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.T, self.bias)


def use_onednn_linear(model: nn.Module) -> None:
    """Let the linear maps of a model of Transformers be computed as HAMT's are (``hamt.cpu.linear``)."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is Conv1D:
            module.__class__ = _Conv1D
