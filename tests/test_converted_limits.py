"""Converted models where numbers are large, on other devices, and where they are called amiss."""

import pytest
import torch
from converted_inputs import SEVERAL, SIZES, tiny_converted, tiny_transformer
from model_inputs import assert_close, random_ids
from transformers import AutoModelForCausalLM
from window_inputs import random_heads, taker

from hamt.batch import Batch
from hamt.convert.exchange import exchange
from hamt.window_and_memory.sizes import Sizes


@pytest.mark.parametrize("sizes", [Sizes(8, 2, 3, 0, 4), Sizes(8, 2, 3, 5, 4)])
def test_positions_of_a_very_long_text_stay_exact(sizes):
    """Beyond 2**24, behind which float32 cannot tell a token from the next one."""
    wide, heads = taker(sizes, reach=3), random_heads(1, 60)
    narrow = taker(sizes, reach=3).float()
    batch = Batch(num_tokens=torch.tensor([2**24 + 4]))
    with torch.no_grad():
        expected, _ = wide(*heads, batch)
        found, _ = narrow(*(x.float() for x in heads), batch)
    assert_close(found.double(), expected, 1e-5)


def test_large_biases_of_addresses_survive_a_checkpoint_in_half_precision(tmp_path):
    """A bias that is rounded to 8 bits would send tokens to other slots."""
    model, ids = tiny_converted(sizes=SEVERAL), random_ids(1, 60)
    with torch.no_grad():
        for layer in model.model.layers:
            if (slots := layer.self_attn.window_and_memory.slots) is not None:
                slots.address_bias += 3000.0
        model.save_pretrained(tmp_path)
        for dtype in (torch.bfloat16, torch.float16):
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
            assert loaded.model.layers[0].self_attn.q_proj.weight.dtype == dtype
            for name, x in loaded.state_dict().items():
                if ".slots." in name or ".salience." in name:
                    assert torch.equal(x, model.state_dict()[name])
            assert loaded(ids).logits.isfinite().all()


def test_it_is_made_where_the_transformer_is():
    with torch.device("meta"):
        model = exchange(tiny_transformer().to("meta"), SIZES)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"meta"}


def test_its_attention_is_not_exchanged_once_more():
    model, ids = tiny_converted(), random_ids(1, 30)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    assert_close(model(ids).logits, expected, 0)
    with pytest.raises(ValueError, match="layers of HAMT choose their own"):
        model.set_attn_implementation("sdpa")


def test_the_transformer_inside_is_not_called_by_itself():
    with pytest.raises(ValueError, match="call the model itself"):
        tiny_converted().model.body(input_ids=random_ids(1, 5))
