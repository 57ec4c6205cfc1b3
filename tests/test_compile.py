"""A compiled model equals the eager one, in one graph, with padding, documents and a state."""

import pytest
import torch
from model_inputs import (
    assert_close,
    assert_same_gradients,
    gradients,
    padded,
    ragged_rows,
    random_ids,
    tiny_config,
    tiny_model,
    without_fused,
)

from hamt import HAMTModel


def assert_compiled_equals_eager(backend: str, options: dict, **arguments) -> None:
    """One graph without breaks, forward and backward."""
    torch._dynamo.reset()
    model, ids = tiny_model(num_layers=1, **options), random_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    outputs = model(ids, labels=ids, **arguments)
    outputs.loss.backward()
    expected = gradients(model)
    actual = compiled(ids, labels=ids, **arguments)
    actual.loss.backward()
    assert_close(actual.logits, outputs.logits)
    assert_same_gradients(model, expected, 1e-3)


@pytest.mark.slow
@pytest.mark.timeout(600)
# Inductor itself uses TorchScript.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_model_equals_the_eager_one():
    assert_compiled_equals_eager("inductor", {})


LEFT_PADDED = {"attention_mask": padded(ragged_rows(9, 6), "left")[1]}
PAIRS = {"seq_idx": torch.arange(9).expand(2, -1) // 4}
WINDOW = {"mixers": "sliding_attention", "sliding_window": 3, "num_sinks": 1}
CORRECTING = {"write_rule": "delta", "rotation": "data_dependent"}


@pytest.mark.parametrize(("options", "arguments", "fused"), [
    ({}, {}, True),
    ({}, LEFT_PADDED | PAIRS, False),
    (CORRECTING, LEFT_PADDED | PAIRS, True),
    (CORRECTING, {}, False),
    (WINDOW, {}, True),
    (WINDOW, LEFT_PADDED | PAIRS, True),
    ({"rotation": "learned", "rotation_heads": 1}, PAIRS, True),
], ids=[
    *("plain", "chunked", "delta", "delta-chunked", "window", "window-packed", "learned-packed")
])  # fmt: skip
def test_a_model_compiles_to_one_graph(options, arguments, fused, monkeypatch):
    """Traced and differentiated as by Inductor, but run by eager kernels: seconds, not a minute."""
    if not fused:
        without_fused(monkeypatch)
    assert_compiled_equals_eager("aot_eager", options, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, WINDOW], ids=["memory", "window"])
def test_a_compiled_model_continues_a_state(options):
    torch._dynamo.reset()
    model, ids = tiny_model(num_layers=1, **options), random_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        logits = [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(6, 9)]
        assert_close(torch.cat(logits, dim=1), model(ids).logits[:, 6:])
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize(
    "options", [{}, {"write_rule": "delta", "mixers": ["memory", "full_attention"]}], ids=str
)
def test_shapes_are_known_without_memory(options):
    """On the meta device, which has no autocast."""
    ids = torch.zeros(2, 20, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model = HAMTModel(tiny_config(**options, use_auxiliary_loss=False)).train()
        outputs = model(ids, labels=ids)
    assert outputs.logits.shape == (2, 20, 97)
    assert outputs.loss.shape == ()
    assert model(ids, labels=ids, return_logits=False).loss.is_meta


def test_a_text_of_any_length_is_refused_for_export():
    """Its tiles are counted in Python; one of fixed length, and any number of rows, is fine."""
    model, ids = tiny_model(use_cache=False), random_ids(2, 20)
    length = torch.export.Dim("length", min=2, max=64)
    with pytest.raises(ValueError, match=r"^a HAMT cannot be exported .* \(hamt export\)"):
        torch.export.export(model, (ids,), dynamic_shapes={"input_ids": {1: length}}, strict=False)


@pytest.mark.filterwarnings("ignore")  # what Python decides is recorded as it was, and it says so
def test_a_text_of_fixed_length_is_traced_and_exported():
    """Both graphs have PyTorch's own operators only, and answer for other tokens."""
    model, ids, other = tiny_model(), random_ids(2, 20), random_ids(2, 20, seed=1)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    program = torch.export.export(Logits(), (ids,), strict=False)
    assert not [node for node in program.graph.nodes if "hamt" in str(node.target)]
    traced = torch.jit.trace(Logits(), (ids,), check_trace=False)
    for run in (program.module(), traced):
        assert_close(run(other), model(other).logits)
