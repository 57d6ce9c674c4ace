"""mindspeed_mm/tools/tools.json: where features go, and what the profiler records. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.schema import Config


class StaticProfile(Config):
    """`profile.static_param`."""

    level: Literal["level_none", "level0", "level1", "level2"] = Field(
        default="level1", description="how much an NPU records; no effect on other devices"
    )
    with_stack: bool = Field(default=False, description="record Python stacks")
    with_memory: bool = Field(default=False, description="record allocations")
    record_shapes: bool = Field(default=False, description="record shapes of operator inputs")
    with_cpu: bool = Field(default=True, description="record host activity")
    save_path: str = Field(default="./profiling", description="folder of the traces")
    start_step: int = Field(default=10, ge=0, description="first iteration recorded")
    end_step: int = Field(default=11, ge=0, description="iteration before which recording ends")
    data_simplification: bool = Field(
        default=False, description="keep only what NPU tools need; no effect on other devices"
    )
    aic_metrics_type: Literal["PipeUtilization", "ArithmeticUtilization"] = Field(
        default="PipeUtilization", description="which NPU counters; no effect on other devices"
    )
    UNUSED: ClassVar[Mapping[str, str]] = {"analyse_flag": "traces are always analysed when they are written"}


class ProfileParam(Config):
    """`profile`: traces of some iterations on some ranks."""

    enable: bool = Field(default=False, description="record; --profile does the same")
    profile_type: Literal["static", "dynamic"] = Field(default="static", description="static only")
    ranks: tuple[int, ...] = Field(default=(0,), description="global ranks that record; -1 = all")
    static_param: StaticProfile = StaticProfile()
    UNUSED: ClassVar[Mapping[str, str]] = {"dynamic_param": "only profile_type static exists"}

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
    start_step: int = Field(default=0, ge=0, description="first iteration recorded")
    end_step: int = Field(default=2, ge=0, description="iteration after which the snapshot is written")
    save_path: str = Field(default="./memory_snapshot", description="folder of the snapshots")
    dump_ranks: tuple[int, ...] = Field(default=(0,), description="global ranks that write one")
    stacks: Literal["all", "python"] = Field(default="all", description="events whose stacks are kept")
    max_entries: int | None = Field(default=None, gt=0, description="maximum number of events kept")
    UNUSED: ClassVar[Mapping[str, str]] = {"mem_info": "metrics.jsonl holds the peak of every iteration"}


class FeatureOutput(Config):
    """`sorafeature`: where feature extraction writes."""

    save_path: str = Field(default="./sora_features", description="folder of the features")


class ToolsConfig(Config):
    """The whole file."""

    profile: ProfileParam = ProfileParam()
    memory_profile: MemoryProfile = MemoryProfile()
    sorafeature: FeatureOutput = FeatureOutput()
