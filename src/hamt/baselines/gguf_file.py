"""A Llama of Transformers as a GGUF file, which llama.cpp reads."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaForCausalLM

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


@torch.no_grad()
def write_gguf(model: LlamaForCausalLM, path: str | Path, weights: str = "F32") -> None:
    """Write a model, without a tokenizer.

    Args:
        model: whose positions are not scaled.
        path: of the file; one that is there is replaced.
        weights: ``F32`` or ``Q8_0``, 8 bits with a scale for each 32 numbers of a row. As in
            llama.cpp's own files, rows of a length that 32 does not divide are kept in 16 bits.

    Raises:
        ValueError: for other weights, or for positions that are scaled.
    """
    config: Any = model.config
    positions = config.rope_parameters
    if weights not in FILE_TYPES:
        raise ValueError(f"weights must be one of {', '.join(FILE_TYPES)}; got {weights!r}")
    if positions["rope_type"] != "default":
        raise ValueError("positions are scaled, which write_gguf does not write")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(FILE_TYPES[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(positions["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a matrix that is tied comes once
        numbers = parameter.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            numbers = _paired(numbers, config.head_dim)
        kind = _kind(numbers, Kind[weights])
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, name
        writer.add_tensor(known, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(numbers: np.ndarray, wanted: Kind) -> Kind:
    """How a tensor is kept: vectors exactly, and matrices as is wanted, if that is possible."""
    if numbers.ndim == 1:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if numbers.shape[-1] % block == 0 else Kind.F16


def _paired(matrix: np.ndarray, head_dim: int) -> np.ndarray:
    """The rows of a projection to queries or keys in the order of llama.cpp.

    Rotary positions turn two features together. Transformers pairs a feature of the first half of
    a head with one of the second half; llama.cpp has the two of a pair side by side.
    """
    halves = matrix.reshape(-1, 2, head_dim // 2, matrix.shape[-1])
    return halves.swapaxes(1, 2).reshape(matrix.shape)
