"""Supervised fine-tuning on conversations, by TRL."""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hamt.errors import UserError
from hamt.finetune.adapters import lora
from hamt.finetune.classify import Training
from hamt.finetune.progress import show_progress

# For a tokenizer without one. What the model is to write ends with the token that ends a text.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}Assistant:"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
MESSAGES = "messages"


class ChatLosses(NamedTuple):
    """Loss of held-out conversations in nats per token that is asked for, before and after."""

    before: float
    after: float


def train_chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: DatasetDict,
    options: Training,
    told: Callable[[float, float], object],
    lora_rank: int = 0,
) -> tuple[PreTrainedModel, ChatLosses]:
    """Train a language model on the column ``messages`` of rows; answers alone are its targets.

    That is so where the chat template marks them, as ``TEMPLATE`` does, which the tokenizer gets if
    it has none; else all tokens are targets. ``told`` is called with the epochs so far and the
    held-out loss.

    Raises:
        UserError: if TRL or PEFT is needed and not there, or answers are too long to be read.
    """
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError("to train on conversations needs TRL: pip install 'trl>=1.16'") from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))
    adapter = lora("CAUSAL_LM", lora_rank)
    arguments = SFTConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved there; it would make a folder here
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=0.1,
        max_length=options.max_length,
        assistant_only_loss="{% generation %}" in tokenizer.get_chat_template(),
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        seed=options.seed,
        disable_tqdm=True,
        bf16=False,
        activation_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=rows["train"].select_columns([MESSAGES]),
        eval_dataset=rows["held_out"].select_columns([MESSAGES]),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    losses: list[float] = []

    def evaluated(epoch: float, found: dict[str, float]) -> None:
        if "eval_loss" not in found:
            raise UserError(
                f"no conversation that is held out has an answer within --max_length "
                f"{options.max_length} tokens: give more of them, or shorter conversations"
            )
        losses.append(found["eval_loss"])
        told(epoch, losses[-1])

    show_progress(trainer, evaluated)
    trainer.evaluate()
    trainer.train()
    trained: Any = trainer.model
    if adapter is not None:
        trained = trained.merge_and_unload()
    return trained, ChatLosses(losses[0], losses[-1])


def check_conversations(rows: DatasetDict) -> None:
    """Refuse rows that are no conversations.

    Raises:
        UserError: with the number of the row.
    """
    for split, found in rows.items():
        if MESSAGES not in found.column_names:
            raise UserError(f"the rows that are held out have no column {MESSAGES!r}")
        for number, messages in enumerate(found[MESSAGES], 1):
            listed: list[Any] = messages if isinstance(messages, list) and messages else [None]
            if not all(map(_is_message, listed)):
                raise UserError(
                    f"row {number} ({split}) holds no conversation: {MESSAGES!r} is a list of "
                    '{"role": "user" or "assistant", "content": "..."}, whose content is text'
                )
            if not any(message["role"] == "assistant" for message in listed):
                raise UserError(f"row {number} ({split}) has no answer of the assistant to learn")


def _is_message(message: Any) -> bool:
    wanted = ("role", "content")
    return isinstance(message, dict) and all(isinstance(message.get(x), str) for x in wanted)
