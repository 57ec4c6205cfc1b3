"""The state of one layer, as a Transformers ``Cache`` keeps it; see ``hamt.cache``."""

from collections.abc import Callable

from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from hamt.mixers import State


class HAMTCacheLayer(LinearAttentionCacheLayerMixin):
    """The state of one layer's mixer; None before the first token."""

    # The state is replaced, not written in place, so a cache cannot be a static input of a graph.
    is_compileable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to prepare: the first forward pass makes the state."""

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        """Refused: a block replaces its state as a whole.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("assign HAMTCacheLayer.state instead")

    update = update_recurrent_state = update_conv_state

    @property
    def is_croppable(self) -> bool:
        """False: what is superposed cannot be taken out again; use ``HAMTCache.fork``."""
        return False

    @property
    def batch_size(self) -> int:
        """Rows of the state, -1 before the first token."""
        return -1 if not self.state else len(next(iter(self.state.values())))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply ``function`` to every tensor of the state."""
        if self.state is not None:
            self.state = {name: function(x) for name, x in self.state.items()}

    def reset(self) -> None:
        """Forget everything."""
        self.state = None

    def offload(self) -> None:
        """Nothing to gain: a state is as small as the keys and values of a short prompt."""

    prefetch = offload

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, which only 0 of them can be.

        Raises:
            NotImplementedError: for any other number.
        """
        if tokens_to_remove:
            raise NotImplementedError(
                "tokens cannot be taken out of a HAMT state: go back to a HAMTCache.fork() made "
                "before they were read"
            )
