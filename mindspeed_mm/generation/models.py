"""ModelStore: the models of a generation, loaded on first use and kept off the device when idle."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.conditioning.vace import StreamEncoder
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.generation.config import VAE_PLANES, Tiled
from mindspeed_mm.generation.experts import Experts
from mindspeed_mm.generation.result import Timings
from mindspeed_mm.models.umt5.encoder import TextEncoder
from mindspeed_mm.models.wan.vae import WanVae


class ModelStore:
    """The transformers, VAE and text encoder of one process.

    Also caches prompt embeddings, and keeps the timings of the current video.
    """

    def __init__(
        self,
        experts: Experts | Callable[[], Experts] | None,
        vae: WanVae | None,
        text_encoder: Callable[[], TextEncoder] | None,
        *,
        accelerator: Accelerator,
        tiled: Tiled = "auto",
        num_experts: int | None = None,
        keep_text_encoder: bool = False,
    ) -> None:
        """`text_encoder` is a function that loads the text encoder. `experts` may also be a loading function.

        `keep_text_encoder` keeps the text encoder on the host between videos instead of freeing it.

        `num_experts` is the number of models that `experts` will load, which selects the shift of the
        presets. It defaults to the number of models given, or 1.
        """
        self.num_experts = num_experts or (len(experts.models) if isinstance(experts, Experts) else 1)
        self.accelerator = accelerator
        self.tiled: Tiled = tiled
        self.cached_prompts: dict[str, Tensor] = {}  # [L, text_dim] on the host
        self.timings = Timings(accelerator)
        self._experts = experts
        self._vae = None if vae is None else vae.to(accelerator.device)
        # Caches the latents of gray clips, which are most of what VACE encodes.
        self._stream_encoder: StreamEncoder | None = None
        self._text_encoder = text_encoder
        self._loaded_text: TextEncoder | None = None
        self.keep_text_encoder = keep_text_encoder

    @property
    def experts(self) -> Experts:
        """The transformers, loaded on first access. Raises WeightsError."""
        if self._experts is None:
            raise WeightsError("this pipeline has no transformer", fix="use it to decode only")
        if not isinstance(self._experts, Experts):
            with self.timings.phase("load"):
                self._experts = self._experts()
        return self._experts

    @property
    def vae(self) -> WanVae:
        """The VAE. Raises WeightsError in a process without one."""
        if self._vae is None:
            raise WeightsError("this pipeline has no VAE", fix="use it to denoise only")
        return self._vae

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder on the device, loaded on first access. Raises WeightsError."""
        if self._loaded_text is None:
            if self._text_encoder is None:
                raise WeightsError(
                    "this pipeline has no text encoder and no cached embedding of the prompt",
                    fix="pass prompt_embeds, or load the pipeline with a text encoder",
                )
            self._loaded_text = self._text_encoder()
        return self._loaded_text.to(self.accelerator.device)

    def free_text_encoder(self) -> None:
        """Free device memory for the transformer. The text encoder is the second largest model."""
        if self._loaded_text is not None and self.keep_text_encoder:
            self._loaded_text.to("cpu")
        else:
            self._loaded_text = None
        self.accelerator.empty_cache()

    def vae_for(self, height: int, width: int) -> WanVae:
        """Return the VAE, tiled if frames of this size need it."""
        tiles = self.tiled == "always" or (self.tiled == "auto" and self.needs_tiles(height, width))
        if tiles != self.vae.tiled:
            self._stream_encoder = None  # its cache was computed with the other setting
            if tiles:
                self.vae.enable_tiling()
            else:
                self.vae.disable_tiling()
        return self.vae

    def stream_encoder(self, height: int, width: int) -> StreamEncoder:
        """Return the encoder for conditions of this size."""
        vae = self.vae_for(height, width)
        self._stream_encoder = self._stream_encoder or StreamEncoder(vae)
        return self._stream_encoder

    def needs_tiles(self, height: int, width: int) -> bool:
        """Return whether decoding whole frames would need more than 80% of the free device memory."""
        free = self.accelerator.total_memory() - self.accelerator.memory_allocated()
        return vae_bytes(self.vae, height, width) > 0.8 * free

    def start_measuring(self) -> None:
        """Reset the timings and the peak memory."""
        self.timings = Timings(self.accelerator)
        self.accelerator.reset_peak_memory()


def vae_bytes(vae: WanVae, height: int, width: int) -> int:
    """Estimate the peak activation bytes of decoding whole frames of this size.

    The estimate is proportional to the area of a frame.
    """
    return int(VAE_PLANES * int(vae.model.config.base_dim) * height * width * vae.model.dtype.itemsize)
