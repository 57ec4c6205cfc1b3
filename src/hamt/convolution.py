"""The short convolution in front of a mixer.

Shape legend: B batch, N tokens, d hidden_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hamt.batch import Batch, take
from hamt.config import HAMTConfig
from hamt.mixers import Mixer, State
from hamt.passes import convolve


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over the last ``kernel_size`` real tokens of a document.

    Padding is skipped wherever it stands, in the middle of a row too.
    """

    def __init__(self, hidden_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        # The token itself; in a model a little of its past is added.
        self.weight = nn.Parameter(torch.zeros(kernel_size, hidden_dim))
        nn.init.ones_(self.weight[-1])

    def forward(
        self,
        inputs: Tensor,
        tail: Tensor | None = None,
        documents: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, N, d) and the tail (B, kernel_size - 1, d) -> outputs and the new tail.

        ``documents`` (B, N) numbers the documents of each row, 0 for the one the tail belongs to.
        """
        batch, length, width = inputs.shape
        reach = self.kernel_size - 1
        if mask is not None:
            # Real tokens move together, padding behind them.
            padding = mask.eq(0)
            order = padding.byte().argsort(dim=1, stable=True)
            inputs = take(inputs, order)
            documents = None if documents is None else documents.gather(1, order)
        tail = inputs.new_zeros(batch, reach, width) if tail is None else tail.to(inputs.dtype)
        output = convolve(inputs, tail, self.weight.to(inputs.dtype), documents)
        if mask is None and documents is None:
            # Not views of the inputs, which would keep the whole sequence.
            return output, torch.cat((tail, inputs[:, -reach:]), dim=1)[:, -reach:].clone()
        # The new tail: the last real tokens, those of an earlier document as zeros.
        index = (length + torch.arange(reach, device=inputs.device)).expand(batch, -1)
        if mask is not None:
            index = index - padding.sum(dim=1, keepdim=True)
        window = torch.cat((tail, inputs), dim=1)
        tail = take(window, index)
        if documents is not None:
            documents = F.pad(documents, (reach, 0))
            same = documents.gather(1, index).eq(documents.gather(1, index[:, -1:]))
            tail = tail * same[..., None]
        return output if mask is None else take(output, order.argsort(dim=1)), tail


class ConvolvedMixer(Mixer):
    """A mixer with the short convolution in front, if ``conv_kernel_size`` is above 1.

    Its state has the convolution's tail as ``conv``, beside what a subclass adds.
    """

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__()
        self.config = config
        self.conv: ShortConvolution | None = None
        if config.conv_kernel_size > 1:
            self.conv = ShortConvolution(config.hidden_dim, config.conv_kernel_size)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """``conv`` (conv_kernel_size - 1, d), the convolution's tail, or nothing."""
        if self.conv is None:
            return {}
        return {"conv": (self.conv.kernel_size - 1, self.config.hidden_dim)}

    def convolve(self, hidden_states: Tensor, batch: Batch, state: State) -> tuple[Tensor, State]:
        """(B, N, d) -> (B, N, d), and what the new state has of the convolution."""
        if self.conv is None:
            return hidden_states, {}
        output, tail = self.conv(hidden_states, state.get("conv"), batch.documents, batch.mask)
        return output, {"conv": tail}
