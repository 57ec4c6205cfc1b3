"""The library that computes matrix products, made the same for all models that are compared."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hamt.base_model import HAMTPreTrainedModel
from hamt.products import FusedLinear, fuse, linear, multiply, pack, unfuse


class OneDNNLinear(nn.Linear):
    """A linear map of a model of Transformers, multiplied as HAMT's are."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return multiply(self, input)


class _Conv1D(Conv1D):
    """GPT-2's linear map, whose matrix is stored transposed."""

    fused: Any

    def forward(self, x: Tensor) -> Tensor:
        fused = self.__dict__.get("fused")
        if fused is not None and (products := fused(x, [self.weight])) is not None:
            return products[0] + self.bias
        return linear(x, self.weight.T, self.bias)


def use_onednn_linear(model: nn.Module) -> None:
    """Compute the linear maps of a model of Transformers as HAMT's are computed.

    What is compared are architectures, and not the libraries that multiply their matrices: see
    ``hamt.products``. The weights stay the same tensors under the same names.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is Conv1D:
            module.__class__ = _Conv1D


def pack_weights(model: PreTrainedModel) -> int:
    """Let a model decode on a CPU from a second copy of its weights, and return the copy's bytes.

    HAMT does as in ``hamt generate``; of others those matrices are packed that
    ``use_onednn_linear`` has found. ``unpack_weights`` undoes it.
    """
    if isinstance(model, HAMTPreTrainedModel):
        return model.fuse_projections()
    taken = fuse(model, (OneDNNLinear,))
    for module in model.modules():
        if type(module) is _Conv1D and (packed := pack([module.weight.T.contiguous()])) is not None:
            module.fused = FusedLinear(packed, [module.weight], outputs=module.nf)
            taken += module.weight.nbytes
    return taken


def unpack_weights(model: PreTrainedModel) -> None:
    """Drop the copy."""
    if isinstance(model, HAMTPreTrainedModel):
        model.unfuse_projections()
    else:
        unfuse(model)
