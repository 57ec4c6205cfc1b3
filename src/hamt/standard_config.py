"""What other libraries read of a configuration: the names that Transformers has for sizes."""

from typing import Any, Self

from transformers import PreTrainedConfig

from hamt.adapters import tell_peft


class StandardNamesConfig(PreTrainedConfig):
    """A configuration whose dictionary, and so its file, has the names of ``attribute_map``, too.

    Both names of a size may be given where they agree.
    """

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
