"""Makes tests/data/torch_npu_ops.json: `python tests/npu_table.py torch_npu-*.whl` reads the ops we call out of the wheels.

The wheels import only where CANN is installed, so their schema file is read as text and nothing of them is run.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

OPS = ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul")
SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
TABLE = Path(__file__).parent / "data" / "torch_npu_ops.json"


def read_wheel(path: Path) -> dict[str, str]:
    """Op → its schema as the wheel registers it."""
    text = zipfile.ZipFile(path).read(SCHEMAS).decode()
    found = (re.search(rf"func: ({op}\(.*)", text) for op in OPS)
    return {op: match[1].strip() for op, match in zip(OPS, found, strict=True) if match}


if __name__ == "__main__":
    wheels = {Path(name).name.split("-")[1]: read_wheel(Path(name)) for name in sys.argv[1:]}
    TABLE.write_text(json.dumps(wheels, indent=1) + "\n")
