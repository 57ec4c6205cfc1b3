"""Classes of HAMT, where Transformers and what builds on it look for them."""

import sys
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

# By a class's name Transformers looks up how Trainer shifts its labels, and what pipelines know.
_KINDS: dict[str, tuple[Any, Any]] = {
    "ForCausalLM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "ForSequenceClassification": (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "ForTokenClassification": (
        AutoModelForTokenClassification,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "ForQuestionAnswering": (
        AutoModelForQuestionAnswering,
        MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
}


def register(config: Any, backbone: type, *heads: type) -> None:
    """Let classes be found by their configuration, by its ``model_type``, and by their names.

    What an installed HAMT has registered already stays: a copy of its code, as
    ``hamt.remote_code`` puts beside a checkpoint, leaves the names to it.
    """
    if config.model_type in CONFIG_MAPPING:
        return
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, backbone)
    for head in heads:
        auto, names = next(kind for end, kind in _KINDS.items() if head.__name__.endswith(end))
        auto.register(config, head)
        names[config.model_type] = head.__name__
    for each in (backbone, *heads):
        # TRL and ``transformers serve`` look a class up here. Transformers makes its module anew
        # while it is imported: some hold the first, some the last.
        for home in (transformers, sys.modules["transformers"]):
            setattr(home, each.__name__, each)
