"""Let the task `edge` make the edges of held-out requests, from the clips themselves, as training did.

python examples/vace/tiny/synthesis/requests.py HELDOUT        a folder that heldout.py wrote
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mindspeed_mm.files import read_json, write_json


def with_edges(folder: Path) -> None:
    """Rewrite `folder`/inference.json: an edge request names its clip and the task, no prepared edges."""
    rows = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    settings = read_json(folder / "inference.json")
    for request, row in zip(settings["tasks"], rows, strict=True):
        if request["name"].endswith("_edge"):
            request.update(video_path=str((folder / row["video"]).resolve()), task={"type": "edge"})
    write_json(folder / "inference.json", settings)


def main() -> None:
    """Rewrite one folder's requests."""
    parser = argparse.ArgumentParser(description="Let the task edge make the edges of held-out requests.")
    parser.add_argument("folder", type=Path)
    with_edges(parser.parse_args().folder)


if __name__ == "__main__":
    main()
