"""What slots learn from: first the attention of each layer, then what the whole model predicts.

Both objectives are modules that ``hamt.training.loop`` trains: they take rows of ids, and give a
loss. The transformer that is learned from is the same model, with full attention and without its
adapters.

Shape legend: B batch, N tokens, d hidden_size, V vocab_size, H query heads, D features of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hamt.convert.branches import join, of_attention, of_slots, short_window, slots_alone
from hamt.converted_model import ConvertedForCausalLM, Pass, full_attention
from hamt.errors import UserError

CHUNK = 256  # tokens whose logits are there at once
ALPHA = 16  # of adapters: over their rank, it is what they are multiplied with


class Objective(nn.Module):
    """A loss of rows of ids. Only what ``learns`` names is trained."""

    def __init__(self, model: ConvertedForCausalLM) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def forward(self, input_ids: Tensor, **others: Any) -> SimpleNamespace:
        """Ids (B, N) -> ``loss``, a number."""
        return SimpleNamespace(loss=self.measure(input_ids))

    def measure(self, input_ids: Tensor) -> Tensor:
        """The loss of ids (B, N)."""
        raise NotImplementedError


class LayerByLayer(Objective):
    """Each layer's slots learn to give back what its attention found far away.

    The loss of a layer has two parts, both 1 for slots that give nothing: the squared error of what
    attention adds to the residual stream, over that of the window alone; and that of what is found
    far away, weighted with the square of the attention that it gets. The second leaves the window
    out, so that the slots cannot rest on it. For the same reason windows are drawn at random: the
    shorter they are, the more there is far away.

    ``windows`` are those that are drawn from, every other time. Otherwise, and always in evaluation
    mode, a layer's own is taken, or a quarter of the row if that is less.
    """

    def __init__(self, model: ConvertedForCausalLM, windows: Sequence[int] = ()) -> None:
        super().__init__(model)
        self.windows = list(windows)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".slots." in name)

    def measure(self, input_ids: Tensor) -> Tensor:
        """The mean over layers, of ids (B, N)."""
        losses: list[Tensor] = []
        draw: int | None = None
        if self.training and self.windows and torch.rand(()) < 0.5:
            draw = self.windows[int(torch.randint(len(self.windows), ()))]
        learns = torch.is_grad_enabled()

        def learn(module: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float):
            taker = module.window_and_memory
            if taker.slots is None:
                return full_attention(module, queries, keys, values, scale)
            own, size = short_window(taker, input_ids.shape[1]), taker.sizes.block
            window = own if draw is None else min(-(-draw // size) * size, own)
            with slots_alone(taker, window):
                found = of_attention(taker, queries, keys, values, scale)
                with torch.set_grad_enabled(learns):
                    far, far_sum = of_slots(taker, queries, keys, values, scale)
            whole = found.join()
            with torch.set_grad_enabled(learns):
                seen = far_sum.isfinite()[..., None]
                got = join(found.near, found.near_sum, far, far_sum.where(seen[..., 0], -1e9))
                out = module.o_proj.weight
                error = ((got - whole) * seen).flatten(2) @ out.mT
                missed = ((found.near - whole) * seen).flatten(2) @ out.mT
                mass = found.mass[..., None] * seen
                far_error = (mass * (far - found.far)).square().sum()
                far_missed = (mass * (found.near - found.far)).square().sum()
                losses.append(
                    error.square().sum() / missed.square().sum().clamp(min=1e-12)
                    + far_error / far_missed.clamp(min=1e-12)
                )
            return whole.to(queries.dtype)

        with torch.no_grad():
            self.model.model.run_body(self.model.model.embed_tokens(input_ids), Pass(instead=learn))
        return torch.stack(losses).mean() / 2


class Distillation(Objective):
    """The whole model learns to predict what the transformer predicts: the divergence of the two.

    Slots learn, and adapters of low rank (LoRA, Hu et al. 2021, arXiv 2106.09685) of the maps of
    values and of outputs of attention, where ``add_adapters`` has put them.
    """

    def __init__(self, model: ConvertedForCausalLM) -> None:
        super().__init__(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name or ".slots." in name)

    def measure(self, input_ids: Tensor) -> Tensor:
        """The divergence from the transformer in nats per token, of ids (B, N)."""
        body = self.model.model
        embedded = body.embed_tokens(input_ids)
        with torch.no_grad(), without_adapters(self.model):
            wanted = body.run_body(embedded, Pass(instead=full_attention))
        return divergence(body.run_body(embedded, Pass()), wanted, self.model.lm_head.weight)


def adapters_of_peft() -> Any:
    """The module of PEFT.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need PEFT: pip install 'peft>=0.17', or --lora_rank 0") from error
    return peft


def add_adapters(model: nn.Module, rank: int) -> None:
    """Adapters of PEFT on the maps of values and outputs.

    Raises:
        UserError: if PEFT is not installed.
    """
    peft = adapters_of_peft()
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["v_proj", "o_proj"])
    peft.inject_adapter_in_model(config, model)


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters."""
    layers = _adapted(model)
    for _, layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for _, layer in layers:
            layer._disable_adapters = False


def merge_adapters(model: nn.Module) -> None:
    """Add adapters to the weights that they adapt, and take them away."""
    for name, layer in _adapted(model):
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())


def divergence(got: Tensor, wanted: Tensor, head: Tensor) -> Tensor:
    """Mean over tokens of KL(wanted ‖ got), in nats, of hidden states (B, N, d) and a head (V, d).

    Only ``got`` has a gradient.
    """
    tokens = got.shape[0] * got.shape[1]
    return _Divergence.apply(got.flatten(0, 1), wanted.flatten(0, 1), head) / tokens


class _Divergence(torch.autograd.Function):
    """Summed over tokens; logits are made ``CHUNK`` tokens at a time, gradients with them."""

    @staticmethod
    def forward(ctx, got: Tensor, wanted: Tensor, head: Tensor) -> Tensor:
        total = torch.zeros((), device=got.device)
        gradient = torch.empty_like(got) if ctx.needs_input_grad[0] else None
        for begin in range(0, len(got), CHUNK):
            part = slice(begin, begin + CHUNK)
            learned = (got[part] @ head.mT).float().log_softmax(dim=-1)
            target = (wanted[part] @ head.mT).float().log_softmax(dim=-1)
            chance = target.exp()
            total += (chance * target.sub_(learned)).sum()
            if gradient is not None:
                gradient[part] = learned.exp_().sub_(chance).to(got.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
