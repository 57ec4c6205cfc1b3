"""The library that computes matrix products, made the same for all models that are compared."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hamt.cpu.linear import Linear, linear


class _Conv1D(Conv1D):
    """GPT-2's linear map, whose matrix is stored transposed."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.T, self.bias)


def use_onednn_linear(model: nn.Module) -> None:
    """Compute the linear maps of a model of Transformers as HAMT's are computed.

    What is compared are architectures, and not the libraries that multiply their matrices: see
    ``hamt.cpu.linear``. The weights stay the same tensors under the same names.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is Conv1D:
            module.__class__ = _Conv1D
