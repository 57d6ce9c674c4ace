"""Traits: notable facts about how a clip or an image is read.

Each trait has a remark for the user, and may change the key of a feature. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# trait → remark that the check and generation print after "3 clips with"; "" = handled, nothing to report.
REMARKS: Mapping[str, str] = {
    "later stream": "a cover or still image before the video stream: the stream that a player shows is read",
    "streams": "several video streams: the one that a player shows is read",
    "untimed": "no timestamps: frames are spaced evenly",
    "no rate": "no frame rate in the stream: 25 fps is assumed",
    "repeats": "timestamps that repeat or restart: frames are selected by index",
    "lead": "no key frame at the start: read from the first key frame on",
    "short": "a truncated end, or fewer frames than the header says: the available frames are read",
    "no alpha": "an alpha channel that is ignored (VP8, VP9): the pixels under it are visible",
    "interlaced": "interlaced frames: both fields are read as one frame",
    "hdr": "HDR colours (PQ or HLG): read without tone mapping, so they look flat",
    "squeezed": "non-square pixels: the image appears squeezed",
    "pictures": "an animation used as a still image: only the first frame is used",
    "mirrored": "",
    "alpha": "",
    "animation": "",
    "reduced": "more pixels than the limit: decoded at a reduced size",
    "pages": "several pages: only the first is read",
    "float": "",
    "deep": "",
    "heic": "",
    "labels": "a colour palette: every index except 0 is white",
    "ignored": "images in a folder that are not read as frames: {}; convert them to PNG",
    "by alpha": "an alpha channel and no image content: opaque is white",
}
# Traits that versions up to 0.1 read differently. They are part of a feature's key, and leave other keys
# unchanged.
REREAD = frozenset(
    {(
        "later stream"
    ), "untimed", "repeats", "lead", "mirrored", "alpha", (
        "animation"
    ), "reduced", "float", "deep", "heic", "labels"}
    | {"by alpha"}
)  # fmt: skip

_OF_MASKS = frozenset({"labels", "by alpha"})
_OF_CLIPS = frozenset({"animation"})


def content_in_slot(slot: str, content: str) -> str:
    """Return what a file's content contributes to the key of a row's `slot`.

    The value is the hash, followed by `|` and the traits that apply to the slot.
    """
    digest, _, found = content.partition("|")
    others = _OF_CLIPS if slot.startswith("src_ref_images") else frozenset[str]()
    others |= frozenset() if slot == "src_video_mask" else _OF_MASKS
    traits = [trait for trait in found.split(",") if trait and trait not in others]
    return f"{digest}|{','.join(traits)}" if traits else digest


def remarks_on(traits: Iterable[str]) -> list[str]:
    """Return the remarks on `traits`, without those that have nothing to report."""
    remarks = []
    for trait in traits:
        word, _, rest = trait.partition(": ")
        remarks.append(REMARKS[word].format(rest))
    return [remark for remark in remarks if remark]
