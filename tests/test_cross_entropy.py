"""The loss without all its logits is the loss."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from model_inputs import random_ids, tiny_model
from torch import nn
from torch.nn.utils import prune  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from hamt.cross_entropy import IGNORE_INDEX, TOKENS, next_token_loss


def problem(length, vocab_size=600, width=24):
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(2, length, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator) / 4
    targets = torch.randint(vocab_size, (2, length), generator=generator)
    targets[0, : length // 3] = IGNORE_INDEX
    return hidden, weight, targets


def loss_and_gradients(function, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    loss.backward()
    return loss.detach(), [x.grad for x in leaves]


# Less than a tile, whole tiles, and some tokens more.
@pytest.mark.parametrize("length", [7, TOKENS // 2, TOKENS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_all_logits(length, dtype):
    hidden, weight, targets = problem(length)

    def reference(hidden, weight):
        # What autocast rounds is rounded here too; all else is float32.
        logits = hidden.to(dtype).float() @ weight.to(dtype).float().T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)

    def tested(hidden, weight):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return next_token_loss(hidden, weight, targets)

    expected, expected_gradients = loss_and_gradients(reference, hidden, weight)
    loss, gradients = loss_and_gradients(tested, hidden, weight)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert ((gradient - wanted).norm() / wanted.norm()).item() < 2 * tolerance


def test_autocast_leaves_double_precision_alone_as_in_every_product():
    hidden, weight, targets = (x.double() if x.is_floating_point() else x for x in problem(50))
    expected = next_token_loss(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(hidden, weight).dtype == torch.float64
        loss = next_token_loss(hidden, weight, targets)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@pytest.mark.parametrize("enabled", [False, True])
def test_shares_of_a_step_add_up(enabled):
    hidden, weight, targets = problem(50)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        whole = next_token_loss(hidden, weight, targets)
        count = targets.ne(IGNORE_INDEX).sum()
        rows = zip(hidden[:, None], targets[:, None], strict=True)
        parts = [next_token_loss(h, weight, t, count) for h, t in rows]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-4)


def test_large_logits_are_no_trouble():
    hidden, weight, targets = problem(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of = partial(next_token_loss, targets=targets)
        loss, gradients = loss_and_gradients(loss_of, 1e4 * hidden, weight)
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_does_not_learn_costs_nothing(frozen):
    hidden, weight, targets = problem(50)
    leaves = {"hidden": hidden, "weight": weight}
    learning = next(tensor for name, tensor in leaves.items() if name != frozen).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        next_token_loss(hidden, weight, targets).backward()
    product = 2 * targets.numel() * weight.numel()
    assert counter.get_total_flops() == 2 * product
    assert learning.grad is not None
    assert leaves[frozen].grad is None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss = next_token_loss(hidden, weight, targets)
    assert counter.get_total_flops() == product
    assert not loss.requires_grad


def test_float64_is_summed_in_float64():
    hidden, weight, targets = problem(40)
    hidden, weight = hidden.double(), weight.double()
    logits = (hidden @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX)
    loss = next_token_loss(hidden, weight, targets).item()
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    leaves = hidden[:, :4].clone().requires_grad_(), weight[:20, :].clone().requires_grad_()
    few = targets[:, -4:] % 20
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, few), leaves)


def lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model)


def biased(model):
    model.lm_head.bias = nn.Parameter(torch.randn(97))


def doubled(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)


def shifted(model):
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def halved_gradients(model):
    model.lm_head.register_full_backward_hook(lambda module, grad, _: (grad[0] / 2,))


def normed(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


def pruned(model):
    nn.utils.prune.l1_unstructured(model.lm_head, "weight", 0.5)


def own_forward(model):
    model.lm_head.forward = lambda inputs: F.linear(inputs, model.lm_head.weight).tanh()


class Capped(nn.Linear):
    def forward(self, input):
        return super().forward(input).clamp(-1, 1)


def of_a_subclass(model):
    model.lm_head.__class__ = Capped


def a_module(model):
    model.lm_head = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 97))


@pytest.mark.parametrize("change", [
    None, lora, biased, doubled, shifted, halved_gradients, normed, pruned, own_forward,
    of_a_subclass, a_module,
], ids=lambda change: getattr(change, "__name__", "plain"))  # fmt: skip
@pytest.mark.parametrize("aux_loss", [False, True])
def test_a_head_that_does_more_has_the_same_loss_without_logits(change, aux_loss):
    model = tiny_model(tie_word_embeddings=False, use_auxiliary_loss=aux_loss)
    torch.manual_seed(1)
    if change is not None:
        change(model)
    model.train()
    ids, found = random_ids(2, 13), []
    for return_logits in (True, False):
        torch.manual_seed(2)
        outputs = model(ids, labels=ids, num_items_in_batch=20, return_logits=return_logits)
        assert (outputs.logits is not None) == return_logits
        outputs.loss.backward()
        found.append((outputs.loss.item(), gradients_of(model)))
    (loss, expected), (other, gradients) = found
    assert other == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    assert any(name.startswith("lm_head") for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def gradients_of(model):
    """Those that there are, taken off the model."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
