"""Tiny converted models with loud random weights, for tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hamt.convert.exchange import exchange
from hamt.converted_model import ConvertedForCausalLM
from hamt.window_and_memory.sizes import Sizes

VOCAB = 300
WITH_EXACT = Sizes(window=8, num_sinks=2, num_slots=3, num_exact=5, block=4)
WITH_SLOTS = WITH_EXACT._replace(num_exact=0)
WINDOW_ALONE = WITH_SLOTS._replace(num_slots=0)


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of four heads, two of them for keys and values."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": VOCAB}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 2:
                    weight.copy_(1.5 * torch.randn_like(weight) / weight.shape[1] ** 0.5)
    return model


def tiny_converted(sizes: Sizes, seed: int = 0) -> ConvertedForCausalLM:
    """``tiny_llama`` of this seed, its attention taken over."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return exchange(tiny_llama(seed), sizes)
