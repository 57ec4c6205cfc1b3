"""Whatever a configuration accepts, a model survives: it trains, reads, writes, and is loaded."""

import math

import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_inputs import BINDINGS

from hamt import HAMTConfig, HAMTForCausalLM
from hamt.config_values import RANGES, ROTATIONS
from hamt.losses import AUXILIARY_LOSSES
from hamt.memory import WRITE_RULES
from hamt.memory.precision import PRECISIONS

SIZES = {"vocab_size": 97, "hidden_dim": 32, "num_layers": 2, "num_slots": 3, "num_heads": 2}
WHOLE = (
    *("hidden_dim", "hcm_dim", "num_layers", "num_slots", "num_heads", "chunk_size"),
    *("conv_kernel_size", "intermediate_dim", "attention_head_dim", "max_position_embeddings"),
    *("sliding_window", "num_sinks", "rotation_heads", "boundary_every"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
BOOLS = (
    *("use_gating", "use_auxiliary_loss", "gate_feedback", "key_feedback", "read_before_write"),
    "normalize_state",
)
REAL = (
    "slow_decay_rate",
    *("rotation_base", "rotation_share", "decay_rate", "min_half_life", "max_half_life", "dropout"),
    *("aux_loss_weight", "contrastive_temperature", "rms_norm_eps", "initializer_range"),
    "embedding_multiplier",
)
edges = {bound for name in REAL for bound in RANGES.get(name, ())} | {math.nextafter(1, 0)}
whole = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 64, -1, True, "2", 2.0, None])
real = st.sampled_from(sorted(edges)) | st.sampled_from(
    [0, 1, 1e-45, 1e-38, 1e38, 1e308, math.inf, math.nan, -1, True, "1", 0.999999, 0.1, 1e-6, 1e6]
)
names = st.lists(st.sampled_from(WHOLE + REAL), max_size=3, unique=True)
kinds = st.fixed_dictionaries(
    {
        "binding_type": st.sampled_from(BINDINGS),
        "write_rule": st.sampled_from(list(WRITE_RULES)),
        "rotation": st.sampled_from(ROTATIONS),
        "mixers": st.sampled_from(
            ["memory", "hierarchical_memory", "full_attention", "sliding_attention"]
        ),
        "auxiliary_loss": st.sampled_from(AUXILIARY_LOSSES),
        "state_precision": st.sampled_from(PRECISIONS),
        **{name: st.booleans() for name in BOOLS},
    }
)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=HealthCheck)
@given(kinds=kinds, names=names, data=st.data())
def test_what_is_accepted_trains_writes_and_is_loaded(kinds, names, data, tmp_path_factory):
    changed = {name: data.draw(whole if name in WHOLE else real, name) for name in names}
    try:
        config = HAMTConfig(**{**SIZES, **kinds, **changed})
    except (ValueError, StrictDataclassError):
        return
    torch.manual_seed(0)
    model, ids = HAMTForCausalLM(config), torch.randint(97, (2, 11))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loss = model(ids, labels=ids).loss
    loss.backward()
    tensors = {name: weight.grad for name, weight in model.named_parameters()} | {"loss": loss}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()
    written = model.generate(ids[:1], max_new_tokens=2, do_sample=False, pad_token_id=0)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    logits = HAMTForCausalLM.from_pretrained(folder)(written).logits
    assert torch.equal(logits, model(written).logits)
    for name, tensor in {**tensors, **model.state_dict(), "logits": logits}.items():
        assert tensor is None or tensor.isfinite().all(), name
