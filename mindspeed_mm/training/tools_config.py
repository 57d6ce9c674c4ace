"""mindspeed_mm/tools/tools.json: where to write features, and what the profiler records. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.schema import Config


class StaticProfile(Config):
    """`profile.static_param`."""

    level: Literal["level_none", "level0", "level1", "level2"] = Field(
        default="level1", description="level of detail on an NPU; no effect on other devices"
    )
    with_stack: bool = Field(default=False, description="record Python stacks")
    with_memory: bool = Field(default=False, description="record allocations")
    record_shapes: bool = Field(default=False, description="record shapes of operator inputs")
    with_cpu: bool = Field(default=True, description="record host activity")
    save_path: str = Field(default="./profiling", description="folder for the traces")
    start_step: int = Field(default=10, ge=0, description="first iteration to record")
    end_step: int = Field(default=11, ge=0, description="iteration before which recording stops")
    data_simplification: bool = Field(
        default=False, description="keep only what NPU tools need; no effect on other devices"
    )
    aic_metrics_type: Literal["PipeUtilization", "ArithmeticUtilization"] = Field(
        default="PipeUtilization", description="NPU counters to record; no effect on other devices"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {"analyse_flag": "traces are always analysed"}


class ProfileParam(Config):
    """`profile`: traces of some iterations on some ranks."""

    enable: bool = Field(default=False, description="record a trace; --profile does the same")
    profile_type: Literal["static", "dynamic"] = Field(default="static", description="must be static")
    ranks: tuple[int, ...] = Field(default=(0,), description="global ranks that record a trace; -1 = all")
    static_param: StaticProfile = StaticProfile()
    UNUSED: ClassVar[Mapping[str, str]] = {"dynamic_param": "only profile_type static is supported"}

    @model_validator(mode="after")
    def _only_static_records(self) -> ProfileParam:
        if self.enable and self.profile_type == "dynamic":
            raise ValueError(
                "profile_type dynamic is not supported; write static, and the steps in static_param"
            )
        return self


class MemoryProfile(Config):
    """`memory_profile`: a snapshot of the device's allocator (CUDA and NPU)."""

    enable: bool = Field(default=False, description="record")
    start_step: int = Field(default=0, ge=0, description="first iteration to record")
    end_step: int = Field(default=2, ge=0, description="iteration after which the snapshot is written")
    save_path: str = Field(default="./memory_snapshot", description="folder for the snapshots")
    dump_ranks: tuple[int, ...] = Field(default=(0,), description="global ranks that write a snapshot")
    stacks: Literal["all", "python"] = Field(default="all", description="which stacks to keep")
    max_entries: int | None = Field(default=None, gt=0, description="maximum number of events to keep")
    UNUSED: ClassVar[Mapping[str, str]] = {
        "mem_info": ("metrics.jsonl contains the peak memory of every iteration")
    }


class FeatureOutput(Config):
    """`sorafeature`: the output of feature extraction."""

    save_path: str = Field(default="./sora_features", description="folder for the features")


class ToolsConfig(Config):
    """The whole file."""

    profile: ProfileParam = ProfileParam()
    memory_profile: MemoryProfile = MemoryProfile()
    sorafeature: FeatureOutput = FeatureOutput()
