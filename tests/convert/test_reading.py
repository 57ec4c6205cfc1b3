"""From where a next token comes: shares that add up, and change what they say."""

import pytest
import torch
from converted_inputs import tiny_transformer

from hamt.convert.exchange import exchange
from hamt.convert.reading import KINDS, sources
from hamt.converted_model import Pass
from hamt.window_and_memory.sizes import Sizes


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def model(request):
    options = {"vocab_size": 50, "num_hidden_layers": 2, "tie_word_embeddings": False}
    if request.param == "gemma3_text":
        options |= {"layer_types": ["full_attention", "sliding_attention"]}
    layers = [Sizes(8, 2, 3, 0, 4), Sizes(8, 2, 3, 4, 4)]
    return exchange(tiny_transformer(request.param, **options), layers).double()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(50, (1, 41), generator=torch.Generator().manual_seed(1))


def test_weights_of_each_head_are_those_of_one_softmax(model, ids):
    found = sources(model, ids)
    assert found.weights.shape == (2, 4, 41)
    assert (found.weights >= -1e-12).all()
    torch.testing.assert_close(found.weights.sum(dim=2), torch.ones(2, 4).double())
    assert found.window.tolist() == [36, 36]
    assert (found.weights[:, :, 2:36].sum(dim=2) > 0.01).all()  # of what has left the window


def test_parts_add_up_to_what_attention_adds_to_the_logit(model, ids):
    outputs, body = [], model.model.body
    hooks = []
    for layer in body.layers:
        if hasattr(layer, "pre_feedforward_layernorm"):  # Gemma: it is normalised, and then added
            adding = layer.post_attention_layernorm
            note = lambda *told: outputs.append(told[2][0, -1])  # noqa: E731
        else:
            adding = layer.self_attn
            note = lambda *told: outputs.append(told[2][0][0, -1])  # noqa: E731
        hooks.append(adding.register_forward_hook(note))
    last = []
    hooks.append(
        body.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0][0, -1]))
    )
    with torch.no_grad():
        model.model.run_body(model.model.embed_tokens(ids), Pass())
    for hook in hooks:
        hook.remove()
    found = sources(model, ids, token=7)
    direction = model.lm_head.weight[7] * body.norm(last[0]) / last[0]
    wanted = torch.stack([output @ direction for output in outputs])
    torch.testing.assert_close(found.logit.sum(dim=1), wanted)
    torch.testing.assert_close(sum(found.by_kind().values()), wanted)
    assert tuple(found.by_kind()) == KINDS


def test_the_token_is_the_most_probable_one_unless_it_is_named(model, ids):
    with torch.no_grad():
        likely = int(model(ids).logits[0, -1].argmax())
    assert sources(model, ids).token == likely
    assert sources(model, ids, token=3).token == 3
