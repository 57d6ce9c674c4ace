"""What can be found in a file's place: nothing, a folder, a pipe, a device, another file, a text about it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 34700000000\n"


def remove(path: Path) -> None:
    """Take a file's place away.

    The copies of the world share their files: nothing may be written through `path`.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path: Path, data: bytes) -> None:
    """Replace `path` with a new file with these bytes."""
    remove(path)
    path.write_bytes(data)


def missing(rng: Random, path: Path) -> None:
    remove(path)


def empty(rng: Random, path: Path) -> None:
    replace(path, b"")


def folder(rng: Random, path: Path) -> None:
    remove(path)
    path.mkdir()


def fifo(rng: Random, path: Path) -> None:
    remove(path)
    os.mkfifo(path)


def device(rng: Random, path: Path) -> None:
    remove(path)
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem"]))


def dangling_link(rng: Random, path: Path) -> None:
    remove(path)
    path.symlink_to("nowhere")


def circular_link(rng: Random, path: Path) -> None:
    remove(path)
    path.symlink_to(path.name)


def lfs_pointer(rng: Random, path: Path) -> None:
    replace(path, LFS_POINTER)


def web_page(rng: Random, path: Path) -> None:
    replace(path, b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>Not Found</body></html>\n")


def another_file(rng: Random, path: Path) -> None:
    """The bytes of a file of another kind."""
    others = [
        "clips/plain.mp4",
        "clips/ref.png",
        "inference.json",
        "weights/config.json",
        "save/iter_0000002/.metadata",
    ]
    others += ["models/Wan2.1_VAE.pth", "weights/diffusion_pytorch_model.safetensors", "prompts.txt"]
    data = path.read_bytes()
    other = rng.choice([name for name in others if Path(name).read_bytes()[:4] != data[:4]])
    replace(path, Path(other).read_bytes())


PLACES = (
    missing,
    empty,
    folder,
    fifo,
    device,
    dangling_link,
    circular_link,
    lfs_pointer,
    web_page,
    another_file,
)
