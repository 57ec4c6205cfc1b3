"""One block of the model: norm, mixer, norm, MLP.

Shape legend: B batch, N tokens, d hidden_dim.
"""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hamt.batch import Batch
from hamt.config import HAMTConfig
from hamt.mixers import MIXERS, State, look_up
from hamt.parts import RMSNorm, residual_linear
from hamt.passes import swiglu
from hamt.products import FusedLinear, plain_weights, project


class HAMTMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): (B, N, d) -> (B, N, d)."""

    def __init__(self, config: HAMTConfig) -> None:
        super().__init__()
        assert config.intermediate_dim is not None  # HAMTConfig fills it in
        self.gate_proj = nn.Linear(config.hidden_dim, config.intermediate_dim, bias=False)
        self.up_proj = nn.Linear(config.hidden_dim, config.intermediate_dim, bias=False)
        self.down_proj = residual_linear(config.intermediate_dim, config.hidden_dim)
        self.fused: FusedLinear | None = None

    def fusable_weights(self) -> list[Tensor]:
        """The matrices that are multiplied with what comes in."""
        return plain_weights(self.gate_proj, self.up_proj)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Transform each token by itself."""
        products = None
        if self.fused is not None:
            products = self.fused(hidden_states, self.fusable_weights())
        gate, up = products or (
            project(self.gate_proj, hidden_states),
            project(self.up_proj, hidden_states),
        )
        return project(self.down_proj, swiglu(gate, up))


class HAMTBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: mixer, then MLP. The state goes in and out as a value."""

    def __init__(self, config: HAMTConfig, mixer: str = "memory") -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_dim, eps=config.rms_norm_eps)
        self.mixer = look_up(MIXERS, mixer)(config)
        has_mlp = config.intermediate_dim != 0
        self.mlp_norm = RMSNorm(config.hidden_dim, eps=config.rms_norm_eps) if has_mlp else None
        self.mlp = HAMTMLP(config) if has_mlp else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, batch: Batch | None = None, state: State | None = None
    ) -> tuple[Tensor, State, Tensor | None]:
        """Hidden states (B, N, d), the state after the last token, and the auxiliary loss."""
        mixed, state, aux_loss = self.mixer(self.mixer_norm(hidden_states), batch, state)
        hidden_states = hidden_states + self.dropout(mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        return hidden_states, state, aux_loss
