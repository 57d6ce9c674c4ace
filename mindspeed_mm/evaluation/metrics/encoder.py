"""Similarity computed with a CLIP or DINO model in a local folder (`--encoder FOLDER`). Downloads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindspeed_mm.conditioning.annotate.opencv import Frame
from mindspeed_mm.errors import WeightsError
from mindspeed_mm.evaluation.sample import Sample
from mindspeed_mm.evaluation.spec import Metric
from mindspeed_mm.files import display_path
from mindspeed_mm.log import get_logger
from mindspeed_mm.models.containers.tensors import why_not_loaded

logger = get_logger(__name__)
_FRAMES = 16  # maximum number of frames that are embedded, evenly spaced
_AT_ONCE = 16


class Encoder:
    """A transformers model that embeds images and, if it is a CLIP model, text."""

    def __init__(self, folder: Path, device: Any = "cpu") -> None:
        """Load the model. Raises WeightsError if `folder` contains no such model or no finite weights."""
        from transformers import AutoModel, AutoProcessor

        from mindspeed_mm.models.finite import check_weights

        try:
            safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            self._model = AutoModel.from_pretrained(folder, **safe).eval().to(device)
            self._processor = AutoProcessor.from_pretrained(folder, **safe)
        except Exception as error:  # transformers raises many kinds for a damaged folder
            is_code = "trust_remote_code" in str(error)
            reason = "it needs custom code, which is never run" if is_code else why_not_loaded(error)
            raise WeightsError(
                f"cannot be opened as a model of transformers: {reason}",
                where=display_path(folder),
                fix="pass the folder of a CLIP or DINO model with its preprocessor_config.json",
            ) from None
        check_weights(display_path(folder), self._model.state_dict())
        self.device = device

    @property
    def reads_text(self) -> bool:
        """Whether text and images share an embedding space."""
        return hasattr(self._model, "get_text_features")

    def images(self, pictures: Sequence[Frame]) -> NDArray[np.float64]:
        """Embed images as unit vectors [N, D]."""
        import torch

        found = []
        for start in range(0, len(pictures), _AT_ONCE):
            part = list(pictures[start : start + _AT_ONCE])
            values = self._processor(images=part, return_tensors="pt").to(self.device)
            with torch.no_grad():
                found.append(_vectors(self._of_images(values)))
        return np.concatenate(found)

    def text(self, prompt: str) -> NDArray[np.float64]:
        """Embed a prompt as a unit vector [1, D]."""
        import torch

        self._report_cut(prompt)
        values = self._processor(text=[prompt], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            return _vectors(_pooled(self._model.get_text_features(**values.to(self.device))))

    def _report_cut(self, prompt: str) -> None:
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        longest = tokenizer.model_max_length
        if len(tokenizer(prompt, verbose=False).input_ids) > longest:
            logger.warning(
                f"encoder_prompt: the encoder reads {longest} tokens; longer prompts are truncated"
            )

    def _of_images(self, values: Any) -> Any:
        if self.reads_text:
            return _pooled(self._model.get_image_features(**values))
        return self._model(**values).last_hidden_state[:, 0]  # the class token of DINO


def encoder_metrics(encoder: Encoder) -> list[Metric]:
    """Return the metrics that compare frames with references and, if the model reads text, the prompt."""

    def of_reference(sample: Sample) -> float | None:
        if not sample.references:
            return None
        return float((encoder.images(sample.references) @ encoder.images(_spread(sample)).T).mean())

    def of_prompt(sample: Sample) -> float | None:
        if not sample.prompt:
            return None
        return float((encoder.text(sample.prompt) @ encoder.images(_spread(sample)).T).mean())

    found = [Metric("encoder_reference", "", "higher", "cosine of references and frames", of_reference)]
    if encoder.reads_text:
        found.append(Metric("encoder_prompt", "", "higher", "cosine of prompt and frames", of_prompt))
    return found


def _spread(sample: Sample) -> list[Frame]:
    count = len(sample.output)
    places = np.unique(np.linspace(0, count - 1, min(count, _FRAMES)).round().astype(int))
    return [sample.output[place] for place in places]


def _pooled(answer: Any) -> Any:
    return getattr(answer, "pooler_output", answer)


def _vectors(values: Any) -> NDArray[np.float64]:
    array = np.asarray(values.float().cpu(), np.float64)
    return np.asarray(array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12))
