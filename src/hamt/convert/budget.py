"""How much each layer carries, by the options, and what that comes to."""

from collections.abc import Iterable, Sequence
from typing import Any

from hamt.convert.options import ConvertOptions
from hamt.converted_model import ConvertedForCausalLM
from hamt.errors import user_errors
from hamt.window_and_memory.sizes import Sizes


def layer_sizes(options: ConvertOptions, wide_layers: Sequence[int], count: int) -> list[Sizes]:
    """Window and memory of each layer."""
    usual = Sizes(
        options.window, options.num_sinks, options.num_slots, options.num_exact, options.block
    )
    wide = usual._replace(
        window=options.wide_window, num_slots=options.wide_slots, num_exact=options.wide_exact
    )
    usual, wide = (_without_slots(each, options.memory) for each in (usual, wide))
    return [wide if layer in wide_layers else usual for layer in range(count)]


def possible_sizes(options: ConvertOptions, own_windows: Sequence[int | None]) -> list[Sizes]:
    """All that a layer can come to carry, before it is known which are the wide ones.

    Args:
        options: of the conversion.
        own_windows: what the transformer's layers see themselves.
    """
    usual, wide = layer_sizes(options, [1], 2)
    kinds = [usual, wide] if options.wide_layers or options.num_wide else [usual]
    return [sizes.fitted(own) for sizes in kinds for own in dict.fromkeys(own_windows)]


def check_sizes(sizes: Iterable[Sizes]) -> None:
    """Refuse sizes of layers that do not fit together.

    Raises:
        UserError: with what would be right.
    """
    for each in sizes:
        with user_errors():
            each.check()


def _without_slots(sizes: Sizes, memory: str) -> Sizes:
    """The same for other kinds of ``--memory``: a slot and an entry are about one token each."""
    if memory == "slots":
        return sizes
    more = (sizes.num_slots + sizes.num_exact) * (memory == "window")
    window = sizes.window + more // sizes.block * sizes.block
    return sizes._replace(window=window, num_slots=0, num_exact=0)


def state_floats(model: ConvertedForCausalLM) -> int:
    """Numbers that a converted model carries for one row, whatever the length of its text."""
    return sum(taker.state_size() for taker in model.model.stateful)


def key_value_floats(model: ConvertedForCausalLM) -> int:
    """Numbers that the transformer keeps of one token in layers that see all of them."""
    takers: list[Any] = model.model.stateful
    return sum(2 * taker.num_groups * taker.head_dim for taker in takers)
