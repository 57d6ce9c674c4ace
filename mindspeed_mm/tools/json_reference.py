"""Write docs/reference/json.md from the schemas of the files.

`python -m mindspeed_mm.tools.json_reference docs/reference/json.md`.
"""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mindspeed_mm.conditioning.recipe import Recipe
from mindspeed_mm.config.names import names_of
from mindspeed_mm.config.schema import Config
from mindspeed_mm.data.config import (
    ClipRow,
    FeatureDatasetConfig,
    FeatureRow,
    LoaderConfig,
    VaceDatasetConfig,
)
from mindspeed_mm.distributed.config import Fsdp2Config
from mindspeed_mm.generation.config import InferenceConfig
from mindspeed_mm.models.transforms.config import FuseLoraConfig, LoraConfig, QuantizeConfig
from mindspeed_mm.models.wan.config import PredictorConfig
from mindspeed_mm.tasks.jobs.extract import ExtractModelConfig
from mindspeed_mm.tasks.jobs.model_json import ModelConfig
from mindspeed_mm.tools.config import ToolsConfig
from mindspeed_mm.training.hooks.config import EarlyStopConfig

HEAD = """# Keys of the JSON and YAML files

Written by `python -m mindspeed_mm.tools.json_reference docs/reference/json.md` from the code; do not edit by
hand.

A key is **honoured** (the tables), **accepted and unused** (listed below a table; the log says so once, with
the reason), or **refused**: one line with the file, the address of the key and the nearest known one.
Relative paths start from the working directory.

| file | for |
|-|-|
"""
_WORDS = {
    bool: "true, false",
    int: "integer",
    float: "number",
    str: "text",
    type(None): "null",
    Any: "anything",
}

Part = tuple[str, type[Config]]  # the address in the file ("" = the top), and the schema there
FILES: tuple[tuple[str, str, tuple[Part, ...]], ...] = (
    (
        "feature_extract/data.json",
        (
            "raw clips: which, and how they are cut (`--mm-data` of feature extraction; "
            "[guide](../guide/data.md))"
        ),
        (("dataset_param", VaceDatasetConfig), ("dataloader_param", LoaderConfig)),
    ),
    (
        "data.json, data.jsonl",
        "the rows of a dataset of raw clips; paths start from its folder, and a key that resembles none of "
        "these is left alone, with a line ([guide](../guide/data.md))",
        (("[]", ClipRow),),
    ),
    (
        "feature_extract/model.json",
        "VAE and text encoder (`--mm-model` of feature extraction)",
        (("", ExtractModelConfig),),
    ),
    (
        "*/feature_data.json",
        "features to train on (`--mm-data` of training)",
        (("dataset_param", FeatureDatasetConfig), ("dataloader_param", LoaderConfig)),
    ),
    (
        "data.jsonl of features",
        "the rows that extraction wrote (`data_path` of `feature_data.json`)",
        (("[]", FeatureRow),),
    ),
    (
        "*/pretrain_model*.json",
        "the model that is trained (`--mm-model` of training)",
        (
            ("", ModelConfig),
            ("predictor", PredictorConfig),
            ("transforms[] of type lora", LoraConfig),
            ("transforms[] of type fuse_lora", FuseLoraConfig),
            ("transforms[] of type quantize", QuantizeConfig),
            ("hooks[] of type early_stop", EarlyStopConfig),
        ),
    ),
    (
        "recipe.yaml",
        "tasks that plain clips become (`vace prepare --recipe`, `dataset_param.synthesis`; "
        "[guide](../guide/synthesis.md))",
        (("", Recipe),),
    ),
    ("fsdp2_config.yaml", "sharding (`--fsdp2-config-path`)", (("", Fsdp2Config),)),
    ("inference/inference_*.json", "what to generate", (("", InferenceConfig),)),
    ("tools/tools.json", "where features go, profiling (`--mm-tool`)", (("", ToolsConfig),)),
)


def reference() -> str:
    """The whole page."""
    index = "".join(f"| [`{name}`](#{_anchor(name)}) | {purpose} |\n" for name, purpose, _ in FILES)
    return HEAD + index + "".join(_file(name, parts) for name, _, parts in FILES)


def _file(name: str, parts: tuple[Part, ...]) -> str:
    inside = {address for address, _ in parts if address}
    return f"\n## `{name}`\n" + "".join(
        table for address, schema in parts for table in _tables(address, schema, inside)
    )


def _tables(address: str, schema: type[BaseModel], elsewhere: set[str]) -> Iterator[str]:
    """The table of one object, then those of the objects in it."""
    fields = {
        name: field for name, field in schema.model_fields.items() if _join(address, name) not in elsewhere
    }
    title = f"`{address}`: " if address else ""
    rows = "".join(_row(name, field) for name, field in fields.items())
    yield f"\n### {title}{_purpose(schema)}\n\n| key | default | type | meaning |\n|-|-|-|-|\n{rows}"
    yield from _unused(getattr(schema, "UNUSED", {}))
    for name, field in fields.items():
        inner, is_list = _object_in(field.annotation)
        if inner is not None:
            yield from _tables(_join(address, name) + ("[]" if is_list else ""), inner, elsewhere)


def _unused(table: Mapping[str, str]) -> Iterator[str]:
    if table:
        reasons = dict.fromkeys(table.values())
        groups = (
            ", ".join(f"`{key}`" for key in table if table[key] == reason) + f": {reason}"
            for reason in reasons
        )
        yield "\nAccepted, unused: " + "; ".join(groups) + ".\n"


def _purpose(schema: type[BaseModel]) -> str:
    text = (schema.__doc__ or schema.__name__).split("\n")[0].rstrip(".")
    head, colon, rest = text.partition("`: ")
    return rest if colon and head.startswith("`") else text.replace("`", "")


_ELSEWHERE = ("by preset", "guidance_scale")  # fields whose default another setting decides


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
    meaning = field.description or ("see below" if _object_in(field.annotation)[0] else "")
    if found := re.search(r" ?\(default: ([^()]+)\)$", meaning):  # for the command line only
        meaning = meaning[: found.start()]
        default = found[1] if field.get_default() is None or found[1] in _ELSEWHERE else default
    return f"| `{name}` | {default} | {_kind(field)} | {meaning.replace('|', '/')} |\n"


def _kind(field: FieldInfo) -> str:
    names = names_of(field)
    return ", ".join(f"`{json.dumps(name)}`" for name in names) if names else _type(field.annotation)


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, ensure_ascii=False, default=list)}`"


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(inner) for inner in get_args(annotation)))
    if get_origin(annotation) is tuple:
        inner = [arg for arg in get_args(annotation) if arg is not Ellipsis]
        many = "list of" if Ellipsis in get_args(annotation) else f"{len(inner)} ×"
        return f"{many} {_type(inner[0])}"
    if get_origin(annotation) is dict:
        return "object"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _object_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The schema of a key's object, or of the objects in its list; None for the bare base class."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (None if annotation is Config else annotation), False
    for inner in get_args(annotation):
        found, is_list = _object_in(inner)
        if found is not None:
            return found, is_list or get_origin(annotation) is tuple
    return None, False


def _join(address: str, name: str) -> str:
    return f"{address}.{name}" if address else name


def _anchor(name: str) -> str:
    return "".join(
        character for character in name.lower() if character.isalnum() or character in "-_ "
    ).replace(" ", "-")


def main(argv: list[str]) -> None:
    """Write the page to argv[0], or to stdout."""
    if argv:
        Path(argv[0]).write_text(reference(), encoding="utf-8")
    else:
        sys.stdout.write(reference())


if __name__ == "__main__":
    main(sys.argv[1:])
