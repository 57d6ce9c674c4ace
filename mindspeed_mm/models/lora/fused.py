"""Records in a checkpoint which LoRAs were fused into its base before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.errors import WeightsError
from mindspeed_mm.files import format_json, parse_json
from mindspeed_mm.models.lora.adapter import Adapter, merged
from mindspeed_mm.models.lora.read import Expert
from mindspeed_mm.models.source import WeightsSource


@dataclass(frozen=True)
class FusedLora:
    """One LoRA and its strength."""

    adapter: Adapter
    strength: float = 1.0
    expert: Expert | None = None


Opener = Callable[..., Adapter]  # models.weights.open_adapter


def write_fused(loras: Sequence[FusedLora]) -> str:
    """Return the JSON for a checkpoint's `base.loras`, or "" without LoRAs."""
    entries = [
        {
            "path": str(lora.adapter.path),
            "strength": lora.strength,
            "expert": lora.expert,
            "fingerprint": lora.adapter.fingerprint(),
        }
        for lora in loras
    ]
    return format_json(entries) if entries else ""


def same_fused(first: object, second: object) -> bool:
    """Return whether two results of `write_fused` describe the same LoRAs, regardless of their paths."""
    return _keys(first) == _keys(second)


def _keys(text: object) -> list[tuple[str, float]]:
    return [(str(entry["fingerprint"]), float(entry["strength"])) for entry in _read(text, "base.loras")]


def fuse_again(base: WeightsSource, text: object, where: object, opener: Opener) -> WeightsSource:
    """Merge the LoRAs that a checkpoint records into `base`. Raises WeightsError if one moved or changed."""
    loras = []
    for entry in _read(text, f"{where}: base.loras"):
        try:
            adapter = opener(entry["path"], base.shapes, expert=entry.get("expert"))
        except WeightsError as error:
            raise WeightsError(
                f"a LoRA that was fused into its base cannot be read: {error}",
                where=str(where),
                fix="restore it to its original path",
            ) from None
        if adapter.fingerprint() != entry["fingerprint"]:
            raise WeightsError(
                f"{adapter.path} is not the LoRA that was fused into its base, its values differ",
                where=str(where),
                fix="restore the LoRA that training used",
            )
        loras.append((adapter, float(entry["strength"])))
    return merged(base, loras)


def _read(text: object, where: str) -> list[dict[str, Any]]:
    if not text:
        return []
    found = parse_json(text, where, WeightsError) if isinstance(text, str) else None
    keys: dict[str, Any] = {"path": str, "strength": int | float, "fingerprint": str}
    if not isinstance(found, list) or not all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in keys.items())
        and entry.get("expert") in (None, "high", "low")
        for entry in found
    ):
        raise WeightsError(
            "got something else", where=where, expected="a list with path, strength, fingerprint"
        )
    return found
