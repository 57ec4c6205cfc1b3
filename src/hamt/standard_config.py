"""What other libraries read of a configuration: the names that Transformers has for sizes."""

import os
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from hamt.adapters import tell_peft
from hamt.memory import WRITE_RULES
from hamt.mixers import GATING_NETWORKS, MIXERS, RETRIEVAL_HEADS, look_up
from hamt.remote_code import INSTALLED, auto_map, write_code


class StandardNamesConfig(PreTrainedConfig):
    """A configuration whose dictionary, and so its file, has the names of ``attribute_map``, too.

    Both names of a size may be given where they agree.
    """

    _with_code: ClassVar[bool] = False

    def __new__(cls, *arguments: Any, **given: Any) -> Self:
        """Refuse two values for one size.

        Raises:
            ValueError: with both, and what to leave out.
        """
        for alias, name in cls.attribute_map.items():
            if alias in given and given.get(name, given[alias]) != given[alias]:
                raise ValueError(
                    f"{name}={given[name]} and {alias}={given[alias]} are two values for one "
                    f"size: leave {alias} out"
                )
        return super().__new__(cls)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; sizes stand there under both of their names."""
        # PEFT asks for this dictionary before it looks up which parts of a model it adapts.
        tell_peft(self.model_type)
        return super().to_dict() | {name: getattr(self, name) for name in self.attribute_map}

    def changed(self, **changes: Any) -> Self:
        """The same with other values of some fields, under their own names."""
        fields = self.to_dict()
        return type(self)(
            **{k: v for k, v in fields.items() if k not in self.attribute_map} | changes
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """From now on models are saved with the code that ``trust_remote_code=True`` runs."""
        if INSTALLED and cls.__module__ == "hamt.config":
            cls._with_code = True
        else:  # a copy of that code, or a class of the user's own
            super().register_for_auto_class(auto_class)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *arguments: Any, **options: Any
    ) -> None:
        """As in Transformers; with all code of the models beside, if that was asked for.

        Raises:
            ValueError: if a part of the model is not of HAMT, whose code is not known.
        """
        if self._with_code:
            self._refuse_foreign_parts()
            write_code(Path(save_directory))
            self.auto_map = auto_map()
        elif getattr(self, "auto_map", None) == auto_map() and INSTALLED:
            del self.auto_map  # of a folder with code, which this one has not
        super().save_pretrained(save_directory, *arguments, **options)

    def _refuse_foreign_parts(self) -> None:
        config: Any = self
        parts = [(name, look_up(MIXERS, name)) for name in config.layer_mixers]
        parts.append((config.write_rule, WRITE_RULES[config.write_rule]))
        parts.append((config.gating_network, look_up(GATING_NETWORKS, config.gating_network)))
        parts.append((config.retrieval_head, look_up(RETRIEVAL_HEADS, config.retrieval_head)))
        for name, part in parts:
            if not part.__module__.startswith("hamt."):
                raise ValueError(
                    f"{name!r} is not a part of HAMT: a model with it cannot be saved with its code"
                )
