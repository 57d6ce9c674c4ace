"""GenerateJob: the settings of a generation run, frozen and checked before torch is imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import field_serializer

from mindspeed_mm.config.flags import FlagParser, add_flags, given
from mindspeed_mm.config.overrides import Overrides
from mindspeed_mm.config.schema import Config, parse
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import (
    format_json,
    json_type,
    read_json,
)
from mindspeed_mm.generation.config import (
    OUTPUT_SUFFIXES,
    InferenceConfig,
    RequestConfig,
    RunConfig,
    WeightPaths,
)
from mindspeed_mm.generation.loras_config import FEW_STEPS
from mindspeed_mm.generation.presets import changed_from_preset
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.locks import check_unlocked
from mindspeed_mm.log import rank
from mindspeed_mm.models.spec import generating_spec
from mindspeed_mm.outputs import check_file, check_folder
from mindspeed_mm.tasks.jobs.find_inputs import PathFinder, find_inputs, find_weights
from mindspeed_mm.tasks.jobs.mindspeed_json import as_mindspeed, suggest_mindspeed
from mindspeed_mm.tasks.jobs.task_rows import inherited, task_rows

PROG = "Wan-VACE-Inference.py"
_REQUEST_KEYS = tuple(RequestConfig.model_fields)


class GenerateJob(Config):
    """A generation run: its weights, its videos, and how it uses memory and devices."""

    model: WeightPaths
    run: RunConfig
    videos: tuple[GenerationRequest, ...]
    notes: tuple[str, ...] = ()
    not_found: tuple[str, ...] = ()  # weights that a plain dry run did not find
    dry_run: bool = False
    print_config: bool = False
    check_inputs: bool = False

    @field_serializer("videos")
    def _videos_as_json(self, videos: tuple[GenerationRequest, ...]) -> list[dict[str, Any]]:
        return [video.to_json() for video in videos]

    @classmethod
    def from_argv(cls, argv: Sequence[str], prog: str = PROG, *, needs_weights: bool = True) -> GenerateJob:
        """Parse `CONFIG.json [--key value…]`.

        Raises ConfigError with the key and file of the first problem. Without `needs_weights`, missing
        weights are listed in `not_found`, as in a dry run.
        """
        parser = job_parser(prog)
        namespace = parser.parse_strict([_dashed(word) for word in argv])
        flags = {**given(namespace, RequestConfig), **given(namespace, RunConfig)}
        weights = given(namespace, WeightPaths)
        job = cls.from_file(
            Path(namespace.config),
            flags=flags,
            weights=weights,
            overrides=Overrides.parse(namespace.set or ()),
            needs_weights=namespace.check_inputs
            or (needs_weights and not (namespace.dry_run or namespace.print_config)),
        )
        switches = {name: getattr(namespace, name) for name in ("dry_run", "print_config", "check_inputs")}
        return job.model_copy(update=switches)

    def to_json(self) -> str:
        """Return the content of job.json."""
        return format_json(self.model_dump(mode="json"), indent=2)

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        flags: dict[str, Any] | None = None,
        weights: dict[str, Any] | None = None,
        overrides: Overrides | None = None,
        transformer_at_hand: bool = False,
        needs_weights: bool = True,
    ) -> GenerateJob:
        """Read a job from an inference JSON.

        `flags` override keys of the JSON and of its tasks. `weights` override keys of its `model`.

        With `transformer_at_hand`, the caller provides the transformer, so that of the JSON need not exist.
        Without `needs_weights`, missing weights are listed in `not_found`.
        """
        values = read_json(path)
        if not isinstance(values, dict):
            raise ConfigError(
                f"got {json_type(values)}",
                where=path,
                expected="a JSON object with keys model, prompt, output_path …",
            )
        return cls.from_values(
            (overrides or Overrides()).apply(values),
            path,
            flags=flags,
            weights=weights,
            transformer_at_hand=transformer_at_hand,
            needs_weights=needs_weights,
        )

    @classmethod
    def from_values(
        cls,
        values: dict[str, Any],
        path: Path,
        *,
        flags: dict[str, Any] | None = None,
        weights: dict[str, Any] | None = None,
        transformer_at_hand: bool = False,
        needs_weights: bool = True,
    ) -> GenerateJob:
        """Build the job from the content of an inference JSON.

        Errors name `path`. Paths may be relative to the folder of `path`.
        """
        keys = {key for key, value in values.items() if value is not None}
        values = _overlaid(values, flags or {}, weights or {})
        notes: list[str] = []
        values = as_mindspeed(values, keys, notes)
        config = parse(InferenceConfig, values, path.name, notes)
        suggest_mindspeed(values, keys, path.name)
        missing: list[str] | None = None if needs_weights else []
        return _built(config, values, path, notes, transformer_at_hand=transformer_at_hand, missing=missing)

    def check_outputs(self) -> None:
        """Check that the videos can be written.

        Raises ConfigError if they cannot, and LaunchError if another run writes to the folder.

        Every rank checks the names, so that all ranks stop together. Only rank 0 checks the disk and the
        lock. A plain --dry-run does not check whether the folder can be created, because the run may be on
        another machine.
        """
        is_here = rank() == 0 and (self.check_inputs or not self.dry_run)
        folder = Path(self.run.output_path)
        check_folder(self.run.output_path, "output_path", probe=is_here)
        for video in self.videos if self.run.from_latents is None else ():
            where = f"output_path, name {video.name!r}"
            check_folder(folder / video.name, where, probe=False)
            for suffix in OUTPUT_SUFFIXES:
                check_file(folder / f"{video.name}{suffix}", where, probe=False)
            for path in video.sampling.latent_files(folder / video.name):
                check_file(path, where, probe=is_here and path.parent.is_dir())
        if is_here:
            check_unlocked(folder, choose="output_path")


def _dashed(word: str) -> str:
    """Convert a flag as the JSON spells it, such as `--num_frames`, to `--num-frames`."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def job_parser(prog: str = PROG, *, config: str = "config") -> FlagParser:
    """Build the parser of Wan-VACE-Inference.py and of `vace generate`.

    `config`: the name of the argument for the JSON file.
    """
    parser = FlagParser(prog, "Generate videos with VACE. Each key of the JSON is a flag too.")
    parser.add_argument(
        config, metavar="CONFIG.json", help="examples/vace/inference/inference_wan2.1_1.3b.json, for one"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved job and stop; needs no weights"
    )
    parser.add_argument("--check-inputs", action="store_true", help="with --dry-run: weights must exist, too")
    parser.add_argument("--print-config", action="store_true", help="print the whole job as JSON, and stop")
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="replace a nested key of the JSON, e.g. tasks[0].seed=7; may be repeated",
    )
    add_flags(parser, RequestConfig, "the video")
    add_flags(parser, WeightPaths, "weights (the JSON's `model`)")
    add_flags(parser, RunConfig, "the run")
    return parser


def _overlaid(values: dict[str, Any], flags: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the JSON and its tasks, overridden by the flags."""
    merged = {**values, **flags}
    if "prompts_file" in flags:
        merged.pop("tasks", None)
    images = {"image_path", "image_paths"}
    if images & flags.keys():
        merged = {key: value for key, value in merged.items() if key not in images or key in flags}
    if isinstance(merged.get("tasks"), list):
        merged["tasks"] = [_without(task, flags, images) for task in merged["tasks"]]
    if weights and isinstance(merged.get("model", {}), dict):
        merged["model"] = {**merged.get("model", {}), **weights}
    return merged


def _without(task: Any, flags: dict[str, Any], images: set[str]) -> Any:
    gone = {*flags, *(images if images & flags.keys() else ())} - {"name"}
    return {key: value for key, value in task.items() if key not in gone} if isinstance(task, dict) else task


def _built(
    config: InferenceConfig,
    values: dict[str, Any],
    path: Path,
    notes: list[str],
    *,
    transformer_at_hand: bool,
    missing: list[str] | None,
) -> GenerateJob:
    bases = (Path.cwd(), path.resolve().parent)
    finder = PathFinder(path.name, bases)
    top = {key: values[key] for key in _REQUEST_KEYS if key in values}
    tasks, where = task_rows(config, values, finder, path.name)
    run = config.model_dump(include=set(RunConfig.model_fields))
    run["prompts_file"] = None
    if config.from_latents is not None:
        run["from_latents"] = finder.find("from_latents", config.from_latents)
    if not (transformer_at_hand or config.from_latents is not None):
        generating_spec(config.model.model_id, f"{path.name}:model.model_id")
    model = find_weights(
        config.model,
        PathFinder(path.name, bases, missing),
        decoding=config.from_latents is not None,
        transformer_at_hand=transformer_at_hand,
    )
    videos = []
    for index, (task, address) in enumerate(zip(tasks, where, strict=True)):
        request = parse(RequestConfig, inherited(top, task), address)
        videos.append(
            _video(
                request,
                finder.at(address),
                index,
                len(model.experts),
                decoding=config.from_latents is not None,
            )
        )
    _distinct(videos, path.name)
    for video in videos:
        name = video.sampling.preset
        if name in FEW_STEPS and not video.loras and config.from_latents is None:
            notes.append(
                f"{video.name}: preset {name} without loras: right only for weights that a few-step LoRA "
                f"is merged into; it is made for {FEW_STEPS[name][1]}"
            )
        if changed := changed_from_preset(video.sampling):
            notes.append(f"{video.name}: not as preset {name} says: {changed}")
    return GenerateJob(
        model=model,
        run=RunConfig(**run),
        videos=tuple(videos),
        notes=tuple(notes),
        not_found=tuple(missing or ()),
    )


def _video(
    config: RequestConfig, finder: PathFinder, index: int, experts: int, *, decoding: bool
) -> GenerationRequest:
    if not (config.prompt or "").strip() and not decoding:
        raise ConfigError(
            "missing",
            where=f"{finder.where}:prompt",
            fix='say what to generate: "prompt": "…" here or in each of tasks, or --prompt',
        )
    if experts == 1 and "guidance_scale_2" in config.model_fields_set:
        raise ConfigError(
            "belongs to the low-noise expert, but model.transformer names one model",
            where=f"{finder.where}:guidance_scale_2",
        )
    inputs, task = find_inputs(config, finder), None
    loras = tuple(
        lora.model_copy(update={"path": finder.find(f"loras[{number}].path", lora.path)})
        for number, lora in enumerate(config.loras if not decoding else ())
    )
    if experts == 1 and any(lora.on != "both" for lora in loras):
        raise ConfigError(
            "names an expert, but model.transformer names one model",
            where=f"{finder.where}:loras",
            fix="remove `on`",
        )
    if config.task is not None and not decoding:
        from mindspeed_mm.generation.tasks import request_task  # lazy: imports numpy and Pillow

        task, inputs = request_task(config.task, inputs, f"{finder.where}:task")
    name = config.name or f"video{index + 1}"
    config = config.model_copy(update={"loras": loras})
    try:
        return GenerationRequest.resolve(config, inputs, experts=experts, name=name, task=task)
    except ConfigError as error:
        raise error.at(finder.where) from None


def _distinct(videos: list[GenerationRequest], where: str) -> None:
    """Raise ConfigError if two videos would write to the same file or folder.

    A video writes NAME, NAME.mp4, NAME.png and NAME.json.
    """
    names = Counter(video.name for video in videos)
    for name, count in names.items():
        if count > 1:
            raise ConfigError(
                f"{count} videos are named {name!r}", where=where, fix="give each task its own name"
            )
        for suffix in OUTPUT_SUFFIXES:
            if f"{name}{suffix}" in names:
                raise ConfigError(
                    f"the folder of video {name + suffix!r} and a file of video {name!r} would have one name",
                    where=where,
                    fix="rename one of them",
                )
