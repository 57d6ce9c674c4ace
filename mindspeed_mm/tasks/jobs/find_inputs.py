"""Finds the files that an inference JSON names."""

from __future__ import annotations

import os
from pathlib import Path

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import (
    display_path,
    regular_file,
)
from mindspeed_mm.generation.config import (
    RequestConfig,
    WeightPaths,
)
from mindspeed_mm.generation.request import KEYS, Inputs


class PathFinder:
    """Finds relative paths, first in the working directory, then in the JSON's folder."""

    def __init__(self, where: str, bases: tuple[Path, ...], missing: list[str] | None = None) -> None:
        """If `missing` is a list, paths that do not exist are added to it and returned unchanged."""
        self.where = where
        self.bases = bases
        self.missing = missing

    def at(self, where: str) -> PathFinder:
        """Return a finder with the same folders whose errors name `where`."""
        return PathFinder(where, self.bases)

    def find(self, key: str, path: str) -> str:
        """Return the existing path. Raises ConfigError with the key and the folders searched."""
        for base in self.bases:
            if os.path.lexists(base / path):
                try:
                    return str(regular_file(base / path, ConfigError, or_folder=True))
                except ConfigError as error:
                    raise error.at(f"{self.where}:{key}") from None
        if self.missing is not None:
            self.missing.append(f"{key} {path}")
            return path
        looked = " and ".join(dict.fromkeys(str(base) for base in self.bases))
        raise ConfigError(
            "no such file or folder" + ("" if Path(path).is_absolute() else f" in {looked}"),
            where=f"{self.where}:{key}: {display_path(path)}",
            fix="set it to an existing file or folder",
        )


def find_weights(
    paths: WeightPaths, finder: PathFinder, *, decoding: bool, transformer_at_hand: bool
) -> WeightPaths:
    """Return the weights that the run needs, with existing paths. Decoding latents needs only the VAE."""
    vae = finder.find("model.vae", paths.vae)
    if decoding:
        return paths.model_copy(update={"vae": vae})
    if transformer_at_hand:
        transformer = paths.experts
    else:
        transformer = tuple(
            tuple(finder.find(f"model.transformer[{index}]", shard) for shard in shards)
            for index, shards in enumerate(paths.experts)
        )
    return WeightPaths(
        transformer=tuple(shards[0] if len(shards) == 1 else shards for shards in transformer),
        vae=vae,
        text_encoder=finder.find("model.text_encoder", paths.text_encoder),
        model_id=paths.model_id,
        tokenizer=None if paths.tokenizer is None else finder.find("model.tokenizer", paths.tokenizer),
    )


def find_inputs(config: RequestConfig, finder: PathFinder) -> Inputs:
    paths = {name: getattr(config, key) for name, key in KEYS.items() if name != "src_ref_images"}
    images, key = config.image_paths or (), KEYS["src_ref_images"]
    if config.image_path is not None:
        images, key = (config.image_path,), "image_path"
    if config.task is None:
        Inputs(**paths, outpaint=config.outpaint).check(finder.where, KEYS)
    found = {name: finder.find(KEYS[name], path) for name, path in paths.items() if path is not None}
    references = tuple(finder.find(key, image) for image in images)
    return Inputs(src_ref_images=references, outpaint=config.outpaint, **found)
