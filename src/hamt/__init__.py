"""HAMT: causal language models whose token mixer is a fixed-size holographic memory."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "1.0.0"

_HOME = {
    "HAMTBackbone": "hamt.model",
    "HAMTCache": "hamt.cache",
    "HAMTConfig": "hamt.config",
    "HAMTForCausalLM": "hamt.model",
    "HAMTForQuestionAnswering": "hamt.model",
    "HAMTForSequenceClassification": "hamt.model",
    "HAMTForTokenClassification": "hamt.model",
    "HAMTLayer": "hamt.layers",
    "HAMTModel": "hamt.model",
    "HolographicMemory": "hamt.memory.holographic",
    "MemoryState": "hamt.memory.holographic",
    "get_algebra": "hamt.memory.algebra",
    "similarity": "hamt.memory.algebra",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:  # what type checkers and editors see
    from hamt.cache import HAMTCache as HAMTCache
    from hamt.config import HAMTConfig as HAMTConfig
    from hamt.layers import HAMTLayer as HAMTLayer
    from hamt.memory.algebra import get_algebra as get_algebra
    from hamt.memory.algebra import similarity as similarity
    from hamt.memory.holographic import HolographicMemory as HolographicMemory
    from hamt.memory.holographic import MemoryState as MemoryState
    from hamt.model import HAMTBackbone as HAMTBackbone
    from hamt.model import HAMTForCausalLM as HAMTForCausalLM
    from hamt.model import HAMTForQuestionAnswering as HAMTForQuestionAnswering
    from hamt.model import HAMTForSequenceClassification as HAMTForSequenceClassification
    from hamt.model import HAMTForTokenClassification as HAMTForTokenClassification
    from hamt.model import HAMTModel as HAMTModel
else:

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        raise AttributeError(f"module 'hamt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# ``import hamt`` registers the model with the Auto classes. Only the ``hamt`` command waits until a
# subcommand needs it, so that its help answers without importing torch.
_NAMED = Path(sys.argv[0]).name in ("hamt", "hamt.exe")
if not (_NAMED or (sys.argv[0] == "-m" and {"hamt", "hamt.cli"} & {*sys.orig_argv})):
    importlib.import_module("hamt.converted_model")
