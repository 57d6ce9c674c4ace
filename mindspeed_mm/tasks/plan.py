"""`vace plan`: estimates the memory and time of a training run before it is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.files import format_json
from mindspeed_mm.log import get_logger, log_table, one_line_errors
from mindspeed_mm.models.wan.flops import tokens_of
from mindspeed_mm.outputs import check_file
from mindspeed_mm.planning.calibrate import calibrate, calibration_file, read_calibration
from mindspeed_mm.planning.counts import AtCount, at_counts
from mindspeed_mm.planning.devices import Device, find_device
from mindspeed_mm.planning.fit import Change, smallest_changes
from mindspeed_mm.planning.memory import Memory, memory_of_ranks, training_memory
from mindspeed_mm.planning.time import HIDDEN, StepTime, step_time
from mindspeed_mm.planning.units import TrainingRun
from mindspeed_mm.tasks import plan_generation
from mindspeed_mm.tasks.jobs.plan import PROG, Clip, PlanFlags, largest_clip, read_job, run_of
from mindspeed_mm.tasks.jobs.pretrain import PretrainJob
from mindspeed_mm.tasks.summary import Rows, describe_model

logger = get_logger(__name__)
GIB = 2.0**30


@dataclass(frozen=True)
class Plan:
    """The estimate of a run on one kind of device."""

    device: Device
    run: TrainingRun
    clip: Clip
    memory: Memory
    time: StepTime
    of_ranks: Sequence[Memory]  # one for each pipeline rank; a single one without stages
    samples: int  # samples per iteration
    iterations: int
    changes: Sequence[Change]
    counts: Sequence[AtCount]

    @property
    def capacity(self) -> float:
        """The device memory that a program can use, in bytes."""
        return self.device.memory * GIB

    @property
    def fits(self) -> bool:
        """Whether the estimate fits in the device's memory."""
        return self.memory.total <= self.capacity

    @property
    def epoch(self) -> float:
        """The number of iterations of one epoch; 0 if the size of the data is unknown."""
        return self.clip.rows / self.samples

    def hours(self, iterations: float) -> float:
        """Return the hours that `iterations` take."""
        return iterations * self.time.total / 3600

    def kwh(self, iterations: float) -> float | None:
        """Return the energy of all devices at their power limit in kWh, or None if the limit is unknown."""
        watts = self.device.watts
        return self.hours(iterations) * watts * self.run.ranks / 1000 if watts else None


@one_line_errors
def main(argv: Sequence[str], prog: str = PROG) -> None:
    """Run the command: print a table or JSON."""
    if "--calibrate" in argv:
        if len(argv) > 1:
            raise ConfigError(
                "takes no other flags",
                where="--calibrate",
                fix="calibrate first, then plan with --device here",
            )
        measure_here()
        return
    if any(word.partition("=")[0] == plan_generation.FLAG for word in argv):
        plan_generation.main(argv, prog)
        return
    job, flags = read_job(argv, prog)
    if job.files.print_config:
        logger.info(job.to_json())
        return
    if flags.picture is not None:
        check_file(flags.picture, "--picture")
    plan = make_plan(job, flags)
    if flags.picture:
        draw(plan, job, Path(flags.picture))
    if "--json" in argv:
        logger.info(format_json(as_json(plan), indent=2))
        return
    log_table(table(plan, job))


def make_plan(job: PretrainJob, flags: PlanFlags) -> Plan:
    """Estimate the memory and time of a job.

    Raises ConfigError for an unknown device or a clip that the model does not accept.
    """
    dtype = job.predictor.dtype
    device = read_calibration(dtype) if flags.device == "here" else find_device(flags.device)
    if flags.mfu:
        device = replace(device, products=flags.mfu, attention=flags.mfu)
    clip = largest_clip(job, flags)
    run = run_of(job, clip.grid)
    memory, capacity = training_memory(run), device.memory * GIB
    changes = smallest_changes(run, device, job.predictor.dtype, capacity) if memory.total > capacity else []
    counts = at_counts(run, device, job.predictor.dtype, capacity)
    batch = job.training.batch
    time = step_time(run, device, job.predictor.dtype)
    return Plan(
        device=device,
        run=run,
        clip=clip,
        memory=memory,
        time=time,
        of_ranks=memory_of_ranks(run),
        samples=batch.global_batch_size or 1,
        iterations=batch.train_iters or 1,
        changes=changes,
        counts=counts,
    )


def measure_here() -> None:
    """Calibrate this device, or those of all torchrun ranks, and print the path of the result."""
    from mindspeed_mm.accelerator import Accelerator
    from mindspeed_mm.distributed.launch import launch

    with launch(Accelerator.detect(), timedelta(minutes=5)) as accelerator:
        found = calibrate(accelerator)
    rows = [
        ("device", f"{found['name']}, {found['memory']:.1f} GiB"),
        ("products", f"{found['half']:.4g} TFLOP/s in bf16, {found['single']:.4g} in fp32"),
        (
            "attention",
            f"{found['attention_half']:.4g} TFLOP/s in bf16, {found['attention_single']:.4g} in fp32",
        ),
        ("elementwise", f"{found['bytes']:.4g} GB/s, {1e6 * found['call']:.1f} µs a call"),
    ]
    if "ranks" in found:
        rate = found.get("link") or found["network"]
        rows.append(("all-to-all", f"{rate:.4g} GB/s a device, of {found['ranks']}"))
    log_table([*rows, ("kept in", str(calibration_file()))])


def table(plan: Plan, job: PretrainJob) -> Rows:
    """Return the rows of the plan's table, about 15 lines."""
    device, memory, time = plan.device, plan.memory, plan.time
    tokens = tokens_of(plan.clip.grid, plan.run.model)
    rows = [
        ("device", f"{plan.run.ranks} x {device.name}, {device.memory:.4g} GiB each"),
        ("model", describe_model(job.model.predictor, job.model.transforms)),
        (
            "sample",
            f"{plan.clip.size}, {tokens} tokens ({plan.clip.origin})",
        ),
    ]
    rows += [
        ("memory" if not number else "", f"{size / GIB:8.2f} GiB  {name}")
        for number, (name, size) in enumerate(memory.terms.items())
        if size
    ]
    verdict = "fits" if plan.fits else "does not fit"
    rows.append(("", f"{memory.total / GIB:8.2f} GiB  in all, at {_article(memory.moment)}: {verdict}"))
    if memory.host:
        rows.append(("host", f"{memory.host / GIB:8.2f} GiB  for each process"))
    rows += [("to fit" if not number else "", line) for number, line in enumerate(_changes(plan))]
    rows.append(
        (
            "step",
            f"{time.total:.2f} s = products {time.products:.2f} + attention {time.attention:.2f} + "
            f"communication {time.communication:.2f} + data {time.data:.2f}{_of_stages(plan)}; "
            f"{time.hidden:.2f} of communication hidden",
        )
    )
    if plan.run.stages:
        rows.append(("stages", _stages(plan)))
    rows.append(
        (
            "assumed",
            f"{device.products:.0%} of {_peak(plan, job):.4g} TFLOP/s in products, {device.attention:.0%} in "
            f"attention, up to {HIDDEN:.0%} of computing hides gathers; features are read ahead",
        )
    )
    rows.append(
        (
            "speed",
            (
                f"{plan.samples / time.total:.3g} samples/s, "
                f"{plan.samples / time.total / plan.run.ranks:.3g} a "
                "device"
            ),
        )
    )
    rows.append(("devices", _scaling(plan)))
    rows.append(("run", _whole_run(plan)))
    if plan.epoch:
        rows.append(("epoch", f"{plan.clip.rows} samples: at most {_cost(plan, plan.epoch)}"))
    return rows


def _article(moment: str) -> str:
    return moment if moment.startswith(("the ", "summing ")) else f"the {moment}"


def _of_stages(plan: Plan) -> str:
    return f" + stages {plan.time.pipeline:.2f}" if plan.run.stages else ""


def _stages(plan: Plan) -> str:
    """Describe the pipeline stages: their layers, their cost, and the memory of each rank."""
    run, time = plan.run, plan.time
    virtual = len(run.stages) // run.pipeline
    chunks = [list(run.stages[part * run.pipeline : (part + 1) * run.pipeline]) for part in range(virtual)]
    layers = chunks[0] if virtual == 1 else chunks
    memory = ", ".join(f"{one.total / GIB:.1f}" for one in plan.of_ranks)
    return (
        f"{layers} layers; bubble {time.bubble:.2f} s, imbalance {time.imbalance:.2f}, tokens sent "
        f"{time.tokens:.2f}; {memory} GiB on the ranks of a pipeline"
    )


def _scaling(plan: Plan) -> str:
    """Describe runs on 1 to 1024 devices with the same work per device."""
    every = [one for one in plan.counts if one.devices in (1, 8, 64, 512, 1024)]
    return "; ".join(
        (
            f"{one.devices}: {one.memory.total / GIB:.0f} GiB{'' if one.fits else ' (does not fit)'}, "
            f"{one.samples_per_second:.3g}/s"
        )
        for one in every
    )


def draw(plan: Plan, job: PretrainJob, path: Path) -> None:
    """Plot the memory on 1 to 1024 devices. Raises ConfigError."""
    from mindspeed_mm.planning.picture import draw_plan

    title = f"{plan.device.name}: {describe_model(job.model.predictor, job.model.transforms)}"
    try:
        draw_plan(path, title, plan.counts, plan.capacity)
    except ConfigError as error:
        raise error.at("--picture") from None


def _changes(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    lines = [
        f"{', '.join(change.settings)}: {change.memory / GIB:.1f} GiB, {change.cost:.2f} x the time"
        + ("" if change.keeps_result else ", another result")
        for change in plan.changes
    ]
    return lines or [
        "no three settings are enough; use more devices, a smaller clip or a device with more memory"
    ]


def _whole_run(plan: Plan) -> str:
    count = "1 iteration" if plan.iterations == 1 else f"{plan.iterations} iterations"
    return f"{count} of {plan.samples}: {_cost(plan, plan.iterations)}"


def _cost(plan: Plan, iterations: float) -> str:
    energy = plan.kwh(iterations)
    energy_note = f", {energy:.3g} kWh at the boards' limit" if energy is not None else ""
    return f"{plan.hours(iterations):.3g} hours{energy_note}"


def _peak(plan: Plan, job: PretrainJob) -> float:
    return plan.device.peak(job.predictor.dtype) / 1e12


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON data, in bytes and seconds."""
    seconds = plan.time.total
    epoch = {"samples": plan.clip.rows, "hours": plan.hours(plan.epoch), "kwh": plan.kwh(plan.epoch)}
    return {
        "device": asdict(plan.device),
        "devices": plan.run.ranks,
        "grid": list(plan.clip.grid),
        "memory": {**plan.memory.terms, "total": plan.memory.total, "moment": plan.memory.moment},
        "host_memory": plan.memory.host,
        "capacity": plan.capacity,
        "fits": plan.fits,
        "changes": [asdict(change) for change in plan.changes],
        "counts": [
            {
                "devices": one.devices,
                "memory": one.memory.total,
                "fits": one.fits,
                "samples_per_second": one.samples_per_second,
            }
            for one in plan.counts
        ],
        "stages": [
            {"rank": one.rank, "memory": one.total, "moment": one.moment}
            for one in plan.of_ranks
            if one.rank is not None
        ],
        "stage_layers": list(plan.run.stages),
        "step_seconds": {**asdict(plan.time), "total": seconds},
        "samples_per_second": plan.samples / seconds,
        "hours": plan.hours(plan.iterations),
        "kwh": plan.kwh(plan.iterations),
        "epoch": epoch if plan.epoch else None,
    }
