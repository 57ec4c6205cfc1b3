"""The same matrix products for all: what is compared is architectures, not libraries of products."""

from functools import partial

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hamt.linear import Linear, linear

# Maps of one input, by the names that they have in Transformers.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Conv1D(Conv1D):
    """GPT-2's linear map, its matrix the other way round."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.T, self.bias)


def share_products(model: nn.Module) -> None:
    """Let the linear maps of a model of Transformers be computed as HAMT's are (``hamt.linear``)."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
        elif type(module) is Conv1D:
            module.__class__ = _Conv1D
    for module in model.modules():
        for names in SIBLINGS:
            maps = [one for name in names if isinstance(one := getattr(module, name, None), Linear)]
            if len(maps) == len(names):
                module.same_input = partial(_weights, maps)  # type: ignore[assignment]


def _weights(maps: list[Linear]) -> list[Tensor]:
    return [one.weight for one in maps]
