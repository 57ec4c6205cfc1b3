"""What the tests of linear maps have in common."""

import torch

FEATURES, OUTPUTS = 384, 512


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def without_onednn():
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None, fp32_precision=None)


def replaced(layer, weight):
    layer.weight.data = weight.clone()


# What can happen to the matrix of a layer: (layer, new matrix).
CHANGES = {
    "in place": lambda layer, weight: layer.weight.copy_(weight),
    "loaded": lambda layer, weight: layer.load_state_dict({**layer.state_dict(), "weight": weight}),
    "replaced through .data": replaced,
    "another parameter": lambda layer, weight: setattr(layer, "weight", torch.nn.Parameter(weight)),
}
