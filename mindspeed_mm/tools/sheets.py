"""Contact sheets of samples and features. Each stream has the frames and the size that the model uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from mindspeed_mm.conditioning.vace import ContextPlan, mask_frames, plan_sample
from mindspeed_mm.data.conditions import TensorSample
from mindspeed_mm.data.features import read_feature, read_info
from mindspeed_mm.data.images import image_traits
from mindspeed_mm.data.probe import probe
from mindspeed_mm.data.sample import FeatureRecord, SampleRecord
from mindspeed_mm.data.sheet import Picture, Strip, draw_sheet, spread
from mindspeed_mm.data.traits import remarks_on
from mindspeed_mm.data.video_writer import picture_frames
from mindspeed_mm.errors import DataError
from mindspeed_mm.files import parse_json
from mindspeed_mm.geometry import WAN


class Decoder(Protocol):
    """The VAE interface that is needed to show latents."""

    @property
    def device(self) -> torch.device: ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, 16, F, h, w] to pixels [B, 3, 4(F-1)+1, H, W] in [-1, 1]."""
        ...


SHOWN = 8  # images in a row
_INACTIVE = "pixels to keep; gray elsewhere"
_REACTIVE = "pixels to generate; gray elsewhere"
_MASK = "white = generate, black = keep"
# Maximum number of pixels per frame for decoding clips together. Small frames decode faster together, but
# large ones would need too much memory.
_SMALL = 256 * 448


def sample_sheet(record: SampleRecord, sample: TensorSample) -> Image.Image:
    """Return the sheet of a dataset row as the model sees it."""
    plan = plan_sample(sample)
    shown = spread(sample.video.shape[1], SHOWN)
    labels = [f"frame {sample.frame_indices[i]} · {i / sample.fps:.2f} s" for i in shown]
    strips = [
        Strip(
            name="video",
            note="training target",
            pictures=_clip(sample.video, shown),
            labels=labels,
        )
    ]
    if sample.src_video is not None:
        strips.append(
            Strip(
                name="src_video",
                note="clip to edit",
                pictures=_clip(sample.src_video, shown),
                labels=labels,
            )
        )
    strips += _condition_strips(sample, plan, shown, labels)
    strips += _references(record, plan)
    return draw_sheet(
        record.address or record.video.name,
        strips,
        facts=_sample_facts(record, sample),
        caption=_captions(sample.captions),
        columns=max(len(shown), 4),
    )


def feature_sheet(
    path: Path, vae: Decoder | None = None, *, decode_frames: int | None = None, verify: bool = True
) -> Image.Image:
    """Return the sheet of a feature file.

    With a VAE, it shows the first `decode_frames` decoded frames (None = all). Without one, it shows three
    principal components of the latents as colours. All strips show the same moments.
    """
    record, info = read_feature(path, verify=verify), read_info(path, verify=verify)
    refs, context = record.num_refs, record.vace_context.float()
    latents = record.latents.float()
    cells = latents.shape[1] - refs
    decoded = cells if vae is None or decode_frames is None else min(cells, WAN.latent_frames(decode_frames))
    shown = spread(decoded, SHOWN)
    inactive, reactive = context[: WAN.channels], context[WAN.channels : 2 * WAN.channels]
    clips = [clip[:, refs : refs + decoded] for clip in (latents, inactive, reactive)]
    references = [latents[:, index : index + 1] for index in range(refs)]
    draw = _painted(latents, shown) if vae is None else _decoded(vae, shown)
    how = "colours represent latents" if vae is None else _decoded_note(decoded, cells)
    masked = mask_frames(WAN.video_frames(cells))
    notes = ("training target", _INACTIVE, _REACTIVE)
    names = ("latents", "inactive", "reactive")
    strips = [
        Strip(
            name=name,
            note=f"{note}; {how}",
            pictures=pictures,
            labels=[f"latent {i} · frame {_middle(i)}" for i in shown],
        )
        for name, note, pictures in zip(names, notes, draw(clips), strict=True)
    ]
    cut = rearrange(context[32:, refs:], "(py px) f h w -> 1 f (h py) (w px)", py=8, px=8)
    strips.append(
        Strip(
            name="mask",
            note=f"{_MASK}; 64 channels unfolded",
            pictures=_masks(cut, shown),
            labels=[f"latent {i} · frame {masked[i]}" for i in shown],
            crisp=True,
        )
    )
    if references:
        alone = (_painted(latents, [0]) if vae is None else _decoded(vae, [0]))(references)
        note = f"each encoded alone; {'decoded' if vae else how}"
        numbers = [f"{index}" for index in range(1, refs + 1)]
        strips.append(
            Strip(name="references", note=note, pictures=[picture for (picture,) in alone], labels=numbers)
        )
    address = info.metadata.get("address")
    return draw_sheet(
        f"feature of {address}" if address else path.name,
        strips,
        facts=_feature_facts(path, record, info.metadata),
        caption=_captions(parse_json(info.metadata.get("captions", "[]"), f"{path}:captions", DataError)),
        columns=max(len(shown), 4),
    )


def _condition_strips(
    sample: TensorSample, plan: ContextPlan, shown: list[int], labels: list[str]
) -> list[Strip]:
    strips = []
    if sample.src_mask is not None:
        seen = ", ".join(map(str, plan.mask_frames[:5])) + (", …" if len(plan.mask_frames) > 5 else "")
        note = f"{_MASK}; the mask channels carry frames {seen}"
        strips.append(
            Strip(
                name="src_mask", note=note, pictures=_masks(sample.src_mask, shown), labels=labels, crisp=True
            )
        )
    if sample.src_mask is not None or sample.src_video is not None:
        strips.append(
            Strip(name="inactive", note=_INACTIVE, pictures=_clip(plan.inactive, shown), labels=labels)
        )
        strips.append(
            Strip(name="reactive", note=_REACTIVE, pictures=_clip(plan.reactive, shown), labels=labels)
        )
    return strips


def _references(record: SampleRecord, plan: ContextPlan) -> list[Strip]:
    if not plan.references:
        return []
    pictures = [_clip(reference, [0])[0] for reference in plan.references]
    labels = [f"{number} · {_shorter(path.name)}" for number, path in enumerate(record.src_ref_images, 1)]
    note = "must appear; letterboxed on white"
    return [Strip(name="references", note=note, pictures=pictures, labels=labels)]


def _sample_facts(record: SampleRecord, sample: TensorSample) -> list[str]:
    frames, height, width = sample.video.shape[1:]
    info = probe(record.video)
    clock = f"{info.fps:g} fps, {info.duration:.2f} s, " if info.timed else ""
    tokens = WAN.tokens(frames, height, width, len(sample.src_ref_images))
    facts = [
        f"{record.video}  ·  {info.num_frames} frames, {clock}{info.width}x{info.height}",
        (
            f"taken: {frames} frames ({sample.frame_policy}) at {sample.fps:.4g} fps, {width}x{height}, "
            f"{tokens} tokens"
        ),
    ]
    if sample.src_video is None and sample.src_mask is None:
        facts.append("no src_video and no mask: inactive and reactive are mid-gray, everything is generated")
    elif sample.src_mask is None:
        facts.append("no mask: everything is generated")
    elif sample.src_video is None:
        facts.append("no src_video: the mask applies to the video itself")
    if sample.src_mask is not None and not sample.src_mask.any():
        facts.append("the mask is white nowhere: nothing is generated, so the branch only learns to copy")
    elif sample.src_mask is not None and bool(sample.src_mask.eq(1).all()):
        facts.append("the mask is white everywhere: no pixel of src_video is kept")
    facts += remarks_on(info.traits)
    for key, path in record.files:
        if path == record.video:
            continue
        traits = (
            image_traits(path)
            if key.startswith("src_ref")
            else probe(path, mask=key == "src_video_mask").traits
        )
        facts += [f"{key}: {remark}" for remark in remarks_on(traits)]
    return facts


def _feature_facts(path: Path, record: FeatureRecord, known: Mapping[str, str]) -> list[str]:
    _, frames, height, width = record.latents.shape
    prompts = ", ".join(str(len(prompt)) for prompt in record.prompt_embeds)
    facts = []
    if known.get("source"):
        facts.append(known["source"])
    if known.get("frames"):
        facts.append(
            f"{known['frames']} frames ({known.get('frame_policy') or 'exact'}) at {known.get('fps', '?')} "
            f"fps, {known.get('width', '?')}x{known.get('height', '?')}, {frames * height * width // 4} "
            "tokens"
        )
    return [
        *facts,
        f"latents {list(record.latents.shape)}  ·  references {record.num_refs}  ·  prompt tokens {prompts}",
        path.name,
    ]


class Palette:
    """Maps latents to colours: the first three principal components of a clip become red, green and blue.

    All strips of a sheet share a palette, so that equal latents have equal colours.
    """

    def __init__(self, latents: Tensor) -> None:
        """Fit the palette to latents [16, F, h, w]."""
        flat = rearrange(latents, "c f h w -> (f h w) c").double()
        self._mean = flat.mean(dim=0)
        _, directions = torch.linalg.eigh((flat - self._mean).T @ (flat - self._mean))
        self._directions = directions[:, -3:].flip(1)
        self._scale = ((flat - self._mean) @ self._directions).std(dim=0, correction=0).clamp_min(1e-3) * 2.5

    def paint(self, latents: Tensor, shown: Sequence[int]) -> list[Picture]:
        """Convert latents [16, F, h, w] to one image [8h, 8w] for each latent frame in `shown`."""
        flat = rearrange(latents[:, list(shown)], "c f h w -> f h w c").double() - self._mean
        colours = ((flat @ self._directions / self._scale + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        _, rows, columns = WAN.stride
        return list(colours.repeat_interleave(rows, 1).repeat_interleave(columns, 2).numpy())


# Draws clips [16, F, h, w] of one size, and returns the images of each clip.
DrawClips = Callable[[Sequence[Tensor]], list[list[Picture]]]


def _painted(latents: Tensor, shown: Sequence[int]) -> DrawClips:
    palette = Palette(latents)
    return lambda clips: [palette.paint(clip, shown) for clip in clips]


def _middle(latent: int) -> int:
    """Return the frame that represents a latent frame. The first covers one frame, each later one four."""
    return max(0, WAN.stride[0] * latent - 1)


def _decoded(vae: Decoder, shown: Sequence[int]) -> DrawClips:
    frames = [_middle(i) for i in shown]

    def draw(clips: Sequence[Tensor]) -> list[list[Picture]]:
        source = [next(j for j, other in enumerate(clips) if torch.equal(other, clip)) for clip in clips]
        unique = sorted(set(source))  # decode equal clips once; without a mask, reactive equals src_video
        pixels = WAN.mask_channels * clips[0].shape[-2] * clips[0].shape[-1]
        at_once = len(unique) if pixels <= _SMALL else 1
        pictures: dict[int, list[Picture]] = {}
        for start in range(0, len(unique), at_once):
            group = unique[start : start + at_once]
            clip = vae.decode(torch.stack([clips[place] for place in group]).to(vae.device))[
                :, :, frames
            ].cpu()
            pictures.update(
                {place: _clip(one, range(len(frames))) for place, one in zip(group, clip, strict=True)}
            )
        return [pictures[place] for place in source]

    return draw


def _decoded_note(decoded: int, cells: int) -> str:
    if decoded == cells:
        return "decoded"
    return f"the first {WAN.video_frames(decoded)} of {WAN.video_frames(cells)} frames, decoded"


def _clip(clip: Tensor, shown: Sequence[int]) -> list[Picture]:
    """Convert pixels [3, T, H, W] in [-1, 1] to images of the frames in `shown`."""
    return list(picture_frames(clip[:, list(shown)]))


def _masks(mask: Tensor, shown: Sequence[int]) -> list[Picture]:
    """Convert a mask [1, T, H, W] in [0, 1] to images of the frames in `shown`."""

    return _clip(mask[:, list(shown)].expand(3, -1, -1, -1) * 2 - 1, range(len(shown)))


def _shorter(name: str, longest: int = 19) -> str:
    return name if len(name) <= longest else name[: longest // 2] + "…" + name[-longest // 2 + 1 :]


def _captions(captions: Sequence[str]) -> str:
    return (
        captions[0]
        if len(captions) == 1
        else "  ".join(f"[{i}] {caption}" for i, caption in enumerate(captions))
    )
