"""Makes tests/data/torch_npu_ops.json.

`python tests/support/npu_table.py torch_npu-*.whl` reads the ops we call out of the wheels.

The wheels import only where CANN is installed, so nothing of them is run: the schema file that registers the
ops is read as text, and the Python functions that shape their results (`@impl(m, "npu_…")`) are read by ast
and must take the same arguments in the same order with the same defaults.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

OPS = ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul")
SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
SHAPES = "torch_npu/op_plugin/meta/_meta_registrations.py"
TABLE = Path(__file__).parents[1] / "data" / "torch_npu_ops.json"


def read_wheel(path: Path) -> dict[str, str]:
    """Map ops to the schemas that the wheel registers.

    Raises SystemExit where the wheel's Python side disagrees.
    """
    wheel = zipfile.ZipFile(path)
    text = wheel.read(SCHEMAS).decode()
    found = (re.search(rf"func: ({op}\(.*)", text) for op in OPS)
    table = {op: match[1].strip() for op, match in zip(OPS, found, strict=True) if match}
    for op, defaults in python_side(wheel.read(SHAPES).decode()).items():
        if defaults_of(table[op]) != defaults:
            raise SystemExit(f"{path}: {op} is registered as {table[op]}, its Python side takes {defaults}")
    return table


def defaults_of(schema: str) -> list[Any]:
    """The defaults of `op(Tensor x, float scale=1., …) -> …` by position; `...` where there is none."""
    parts = re.search(r"\((.*?)\) ->", schema)[1].split(", ")  # type: ignore[index]
    return [ast.literal_eval(part.partition("=")[2]) if "=" in part else ... for part in parts if part != "*"]


def python_side(text: str) -> dict[str, list[Any]]:
    """Map ops to the defaults, by position, of the functions that return their output shapes.

    The parameter names differ from those of the op.
    """
    found = {}
    for node in ast.parse(text).body:
        for op in OPS if isinstance(node, ast.FunctionDef) else ():
            if any(ast.unparse(decorator) == f"impl(m, '{op}')" for decorator in node.decorator_list):
                given = [ast.literal_eval(value) for value in node.args.defaults]
                found[op] = [...] * (len(node.args.args) - len(given)) + given
    return found


if __name__ == "__main__":
    wheels = {Path(name).name.split("-")[1]: read_wheel(Path(name)) for name in sys.argv[1:]}
    TABLE.write_text(json.dumps(wheels, indent=1) + "\n")
