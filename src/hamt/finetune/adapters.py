"""Adapters of low rank, as PEFT has them, for both kinds of fine-tuning."""

from typing import Any

from hamt.errors import UserError


def lora(task: str, rank: int) -> Any:
    """PEFT's configuration of adapters of a rank, or None for the rank 0.

    Raises:
        UserError: if PEFT is not installed.
    """
    if not rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("--lora_rank needs PEFT: pip install 'peft>=0.17'") from error
    return LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank)
