"""Tiny transformers of the kinds that can be converted, and what they are converted to."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hamt.converted_config import KNOWN, ConvertedConfig
from hamt.converted_model import ConvertedForCausalLM
from hamt.window_and_memory.sizes import Sizes

VOCAB = 97
SIZES = Sizes(16, 2, 4, 0, 4)
# A whole window, exact entries beside slots, and neither slots nor sinks.
SEVERAL = [SIZES, Sizes(8, 2, 4, 3, 4), Sizes(16, 0, 0, 0, 8)]
# What a tiny model of a kind needs to be like the others.
OPTIONS = {
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 64,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,
    }
}


def tiny_transformer(kind: str = "llama", seed: int = 0, **options) -> PreTrainedModel:
    """In evaluation mode, with logits that depend on all that came before."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **{**sizes, **OPTIONS.get(kind, {}), **options})
        return AutoModelForCausalLM.from_config(config).eval()


def convert(
    transformer: PreTrainedModel, sizes: Sizes | list[Sizes] = SIZES, reach: int = 12
) -> ConvertedForCausalLM:
    """With the weights of a transformer, and loud random ones of the slots."""
    count = transformer.config.num_hidden_layers
    layers = [list(each) for each in ([sizes] * count if isinstance(sizes, Sizes) else sizes)]
    config = ConvertedConfig(transformer.config.to_dict(), layers, reach)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ConvertedForCausalLM(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "window_and_memory" in name:
                    weight.add_(0.3 * torch.randn_like(weight))
    weights = {
        name.replace("model.", "model.body.", 1): x for name, x in transformer.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("window_and_memory" in name for name in missing)
    return model.eval()


def tiny_converted(
    kind: str = "llama", sizes: Sizes | list[Sizes] = SIZES, reach: int = 12, **options
) -> ConvertedForCausalLM:
    """A tiny transformer that was converted."""
    return convert(tiny_transformer(kind, **options), sizes, reach)


__all__ = ["KNOWN", "SEVERAL", "SIZES", "VOCAB", "convert", "tiny_converted", "tiny_transformer"]
