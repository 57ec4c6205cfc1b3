"""What the tests of linear maps have in common."""

import torch

FEATURES, OUTPUTS = 384, 512


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def without_onednn():
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None, fp32_precision=None)
