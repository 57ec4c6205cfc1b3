"""Models that decode by a copy, and how tests see whether it has."""

import torch
from model_inputs import tiny_model

from hamt.decoding import Decoder

BASE = {"hidden_dim": 40, "hcm_dim": 48, "num_slots": 3, "num_heads": 2}


def model_of(**options):
    """With weights of no special value: zeros and ones hide what is left out."""
    model = tiny_model(**{**BASE, "num_layers": 2, **options}).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight) * weight.square().mean().sqrt())
    return model


def counted_runs(monkeypatch):
    """How often a copy has taken over, True, or left it to PyTorch, False."""
    found, run = [], Decoder.run

    def counted(self, *arguments):
        result = run(self, *arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(Decoder, "run", counted)
    return found


@torch.no_grad()
def decode(model, ids, prompt=9, **options):
    """Logits (B, N - prompt, V), a token at a time, and the last state."""
    cache = model(ids[:, :prompt], use_cache=True).past_key_values
    logits = [
        model(ids[:, t : t + 1], past_key_values=cache, **options).logits
        for t in range(prompt, ids.shape[1])
    ]
    return torch.cat(logits, dim=1), cache


def close(found, expected, tolerance=2e-5):
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= tolerance * scale
