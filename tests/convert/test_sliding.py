"""Transformers some of whose layers see a window themselves: what they never saw, nobody sees."""

import json

import pytest
import torch
from converted_inputs import tiny_transformer
from model_inputs import assert_close, random_ids

from hamt.cli import main
from hamt.convert.branches import of_attention
from hamt.convert.exchange import exchange
from hamt.converted_config import ConvertedConfig
from hamt.converted_model import Pass, full_attention
from hamt.window_and_memory.sizes import Sizes

SLIDING = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 8},
}
OWN = {"mistral": [8, 8, 8], "qwen2": [None, 8, 8], "gemma3_text": [8, None, 8]}
kinds = pytest.mark.parametrize("kind", SLIDING)


def exchanged(kind, sizes):
    return exchange(tiny_transformer(kind, **SLIDING[kind]), sizes)


@torch.no_grad()
def expected(kind, ids, **options):
    return tiny_transformer(kind, **{**SLIDING[kind], **options})(ids).logits


@kinds
def test_it_can_still_be_the_transformer(kind):
    ids = random_ids(2, 60)
    model, wanted = exchanged(kind, Sizes(4, 2, 4, 0, 2)), expected(kind, ids)
    assert (expected(kind, ids, sliding_window=64) - wanted).abs().max() > 0.1
    with torch.no_grad():
        hidden = model.model.run_body(model.model.embed_tokens(ids), Pass(instead=full_attention))
        assert_close(model.lm_head(hidden), wanted, 2e-5)
        assert (model(ids).logits - wanted).abs().max() > 0.1


@kinds
@pytest.mark.parametrize(("block", "window"), [(1, 8), (4, 12), (16, 32)])
def test_a_window_as_long_as_the_own_one_is_exact(kind, block, window):
    """It has room for all that is seen at any place in a block; others cover the text here."""
    ids = random_ids(2, 60)
    model = exchanged(kind, Sizes(64, 1, 4, 0, block))
    windows = [window if own else 64 for own in OWN[kind]]
    assert [sizes.window for sizes in model.config.sizes] == windows
    slots = [0 if own else 4 for own in OWN[kind]]
    assert [sizes.num_slots for sizes in model.config.sizes] == slots
    wanted = expected(kind, ids)
    with torch.no_grad():
        assert_close(model(ids).logits, wanted, 2e-5)
        cache, parts = None, []
        for part in ids.split([7, 1, 20, 32], dim=1):
            outputs = model(part, past_key_values=cache, use_cache=True)
            cache, parts = outputs.past_key_values, [*parts, outputs.logits]
        assert_close(torch.cat(parts, dim=1), wanted, 2e-5)
        padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), ids), dim=1)
        mask = torch.ones_like(padded)
        mask[:, :5] = 0
        assert_close(model(padded, attention_mask=mask).logits[:, 5:], wanted, 2e-5)


@kinds
def test_what_slots_learn_from_is_what_attention_saw(kind):
    """Near and far, joined, are what the transformer's attention gives in every layer."""
    model, ids = exchanged(kind, Sizes(4, 2, 4, 0, 2)), random_ids(1, 60)
    far = []

    def both(module, queries, keys, values, scale):
        found = of_attention(module.window_and_memory, queries, keys, values, scale)
        whole = full_attention(module, queries, keys, values, scale)
        assert_close(found.join(), whole, 2e-5)
        far.append(found.distance[0].amax())
        return whole

    with torch.no_grad():
        model.model.run_body(model.model.embed_tokens(ids), Pass(instead=both))
    for furthest, own in zip(far, OWN[kind], strict=True):
        assert furthest < 8 if own else furthest > 8


@pytest.mark.parametrize(
    "sizes",
    [
        *(Sizes(2, 1, 0, 0, 1), Sizes(2, 0, 1, 40, 1), Sizes(4, 1, 0, 0, 4), Sizes(4, 0, 1, 40, 4)),
    ],
)
def test_single_tokens_are_seen_as_long_as_attention_saw_them(sizes):
    """What a sink or exact entry adds ends where the own window does (nothing is in the slot)."""
    model = exchanged("mistral", sizes)
    taker = model.model.stateful[0]
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(1, 40, 8, 8, generator=generator)
    queries, keys, values = heads[:, :, :4], heads[:, :, 4:6], heads[:, :, 6:]
    changed = values.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        differences = (taker(queries, keys, values)[0] - taker(queries, keys, changed)[0]).abs()
    seen = differences[0].amax(dim=(-2, -1)) > 1e-6
    assert seen[:8].all()
    assert not seen[8:].any()


def test_a_window_beyond_the_own_one_is_refused():
    fields = tiny_transformer("gemma3_text", sliding_window=8).config.to_dict()
    sizes = [list(Sizes(16, 2, 4, 0, 4))] * 3
    with pytest.raises(ValueError, match="window must be at most 12 in layer 0, whose"):
        ConvertedConfig(fields, sizes)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_attention_that_is_more_than_a_softmax_is_refused(name):
    fields = tiny_transformer("gemma3_text").config.to_dict()
    with pytest.raises(ValueError, match=f"attention with {name} cannot be taken over"):
        ConvertedConfig({**fields, name: 30.0})


def test_all_stages(tokenizer, tmp_path, capsys):
    """A tiny Gemma 3 is converted, and its memory comes nearer to what its attention was."""
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "initializer_range": 0.2}
    model = tiny_transformer("gemma3_text", **sizes, sliding_window=24)
    model.save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    (tmp_path / "text.txt").write_text("The state of the Union is strong. " * 400)
    stages = "--calibrate_rows 2 --calibrate_length 64 --layers_steps 6 --layers_length 64 "
    stages += "--layers_windows 8 --whole_lengths 64 --whole_steps 4 --eval_rows 1"
    carried = "--window 8 --block 8 --num_slots 8 --num_sinks 2"
    command = f"convert {tmp_path}/gemma --data {tmp_path}/text.txt {carried} {stages}".split()
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "convert_info.json").read_text())
    first, *_, last = [row["divergence"] for row in record["stages"]]
    assert last < first
    assert main(["generate", "The", "--checkpoint", str(tmp_path / "out")]) == 0
