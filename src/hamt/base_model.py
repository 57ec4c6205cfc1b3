"""What all HAMT models share: initialisation, loading, and what adapters are told of them."""

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from hamt.block import HAMTBlock
from hamt.boundaries import Feedback
from hamt.config import HAMTConfig
from hamt.convolution import ShortConvolution
from hamt.decoding import WEIGHTS, make_decoder
from hamt.hierarchical_memory import Consolidation
from hamt.loading import refuse_incomplete
from hamt.parts import GatingNetwork, RetrievalHead
from hamt.products import fuse, library_found, unfuse
from hamt.remote_code import INSTALLED
from hamt.rotation import Rotation
from hamt.window_and_memory.exact import Salience
from hamt.window_and_memory.slots import Slots

_BODY = ("embed_tokens.", "layers.", "norm.")  # what a backbone is made of


class HAMTPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving shared by all HAMT models."""

    config_class = HAMTConfig
    config: HAMTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["HAMTBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": HAMTBlock}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only modules with parameters of their own come here: Transformers skips others in code not
        # its own.
        if isinstance(module, nn.Linear):
            # Variance-preserving at any width, where the usual 0.02 would make small models deaf;
            # into the residual stream so that its scale stays constant (Radford et al. 2019).
            depth = 2 * self.config.num_layers if getattr(module, "into_residual", False) else 1
            init.normal_(module.weight, std=(depth * module.in_features) ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RetrievalHead):
            # Reading all slots from the start; without it training starts far more slowly.
            init.ones_(module.read_bias)
        elif isinstance(module, GatingNetwork):
            init.copy_(module.bias, module.initial_bias())
            if module.weight is not None:
                init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, Rotation):
            if module.weight is not None:
                init.zeros_(module.weight)
            if module.log_frequency is not None:
                init.copy_(module.log_frequency, module.initial_log_frequency())
        elif isinstance(module, Feedback):
            for weight in module.parameters():
                init.zeros_(weight)
        elif isinstance(module, Consolidation):
            for name, initial in module.initial_weights().items():
                init.copy_(getattr(module, name), initial)
        elif isinstance(module, ShortConvolution):
            # The token itself, with a little of its past.
            init.normal_(module.weight, std=0.1)
            init.ones_(module.weight[-1])
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in Transformers, which leaves what is in a model of its own to that model."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Slots | Salience):
                for name, initial in module.initial_weights().items():
                    init.copy_(getattr(module, name), initial)

    @classmethod
    def from_pretrained(cls, *arguments, output_loading_info: bool = False, **options):
        """As in Transformers, but weights that are missing, or too many, are an error.

        ``ignore_mismatched_sizes=True`` initialises what is missing instead, and so does
        ``output_loading_info=True``, which returns what it was. A checkpoint of another class may
        have a head that this class has not, and lack the one that it has.

        Raises:
            ValueError: with the names of the weights.
        """
        found: Any = super().from_pretrained(*arguments, output_loading_info=True, **options)
        model, report = found
        if output_loading_info:
            return model, report
        if not options.get("ignore_mismatched_sizes"):
            missing, unexpected = report["missing_keys"], report["unexpected_keys"]
            if cls.__name__ not in (model.config.architectures or [cls.__name__]):
                body = (f"{cls.base_model_prefix}.", *_BODY)
                missing = {name for name in missing if name.startswith(body)}
                unexpected = {name for name in unexpected if name.startswith(body)}
            try:
                refuse_incomplete(missing, unexpected)
            except ValueError as error:
                raise ValueError(
                    f"not a whole checkpoint of a {cls.__name__}: {error} "
                    "(ignore_mismatched_sizes=True initialises what is missing)"
                ) from None
        return model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """From now on models are saved with their code, for ``trust_remote_code=True``.

        It does for all classes of HAMT what Transformers does for one: without HAMT installed,
        ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` gives the model.
        """
        if INSTALLED and cls.__module__ == "hamt.model":
            cls.config_class.register_for_auto_class()
        else:  # a copy of that code, or a class of the user's own
            super().register_for_auto_class(auto_class)

    def fuse_projections(self, weights: torch.dtype = torch.float32) -> int:
        """Decode faster on a CPU, at the price of a second copy of the weights; returns its bytes.

        A model whose mixers are all memories reads a token in one call of compiled code
        (``hamt.decoding``); in any other, maps with the same input become one product
        (``hamt.products.fuse``). Training, a change of dtype or device, and
        ``unfuse_projections`` undo it. Where weights were exchanged or changed, PyTorch computes
        (``generate`` looks at them once, when it begins); not noticed are changes through ``.data``
        and, in models of other mixers, in place: call it again.

        Args:
            weights: how the copy keeps matrices: float32, or bfloat16 or int8 (with a scale for
                each row of a matrix), which are faster and not the same.

        Raises:
            ValueError: if ``weights`` is another dtype, or one that this model cannot have.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights are one of {', '.join(map(str, WEIGHTS))}; got {weights}")
        self.unfuse_projections()
        backbone: Any = self.base_model
        native = None
        if library_found():  # compiles, or says that there is no compiler: now, not amid a text
            native = make_decoder(backbone, getattr(self, "lm_head", None), weights)
        if native is None and weights != torch.float32:
            raise ValueError(
                f"this model cannot decode with {weights} weights: that needs a C++ compiler, and "
                "memories without boundaries in all layers"
            )
        if native is None:
            return fuse(self)
        backbone.native = native
        return native.nbytes

    def unfuse_projections(self) -> None:
        """Undo ``fuse_projections``."""
        unfuse(self)
        backbone: Any = self.base_model
        backbone.native = None

    def init_continuous_batching(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refused: continuous batching hands out pages of keys and values.

        Raises:
            ValueError: always, with what to call instead.
        """
        raise ValueError(
            "HAMT has no keys and values that continuous batching could keep in pages: give "
            "generate the prompts as one batch, padded on the left"
        )

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Refuse a choice that no layer would follow; Transformers calls it.

        Raises:
            ValueError: for all but ``None`` and ``"eager"``.
        """
        if requested_attention not in (None, "eager"):
            raise ValueError(
                f"attn_implementation={requested_attention!r} is a way to compute attention in "
                "models of Transformers; layers of HAMT choose their own: leave it out"
            )
        return "eager"

    def train(self, mode: bool = True):
        """As ``nn.Module.train``; weights that are about to change are not fused any more."""
        if mode:
            self.unfuse_projections()
        return super().train(mode)

    def load_state_dict(self, *arguments, **options):
        """As ``nn.Module.load_state_dict``; what was fused of the old weights is dropped."""
        self.unfuse_projections()
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments, **options):
        self.unfuse_projections()
        return super()._apply(*arguments, **options)
