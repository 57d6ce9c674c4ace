"""The worker process of a server, which keeps the models loaded and processes the queued jobs in turn.

Several processes share each video (context and CFG parallelism). With `data_parallel`, each process makes its
own videos.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.data.conditions import Conditions
from mindspeed_mm.distributed.launch import launch
from mindspeed_mm.errors import MindSpeedMMError
from mindspeed_mm.files import read_json_object
from mindspeed_mm.generation.denoise import Step
from mindspeed_mm.generation.layout import choose_layout
from mindspeed_mm.generation.models import ModelStore
from mindspeed_mm.generation.outputs import VideoFiles
from mindspeed_mm.generation.parallel import SINGLE, ContextParallel, DataParallel, SingleProcess
from mindspeed_mm.generation.request import GenerationRequest
from mindspeed_mm.generation.run import generate
from mindspeed_mm.generation.usual import unusual
from mindspeed_mm.log import get_logger, on_every_rank, one_line_errors, rank, world_size
from mindspeed_mm.processes import check_stop
from mindspeed_mm.serve.engine import late_error
from mindspeed_mm.serve.folders import JobFolders, build_job, translate_error, translator
from mindspeed_mm.serve.jobs import JobStore
from mindspeed_mm.serve.loras import Loras
from mindspeed_mm.serve.problem import describe_error
from mindspeed_mm.serve.queue_file import Job
from mindspeed_mm.serve.worker_queue import WorkerQueue
from mindspeed_mm.tasks.generate_videos import check_weights, open_models, run_settings
from mindspeed_mm.tasks.jobs.generate import GenerateJob

LOGGER = get_logger(__name__)
_POLL = 0.1  # seconds between two polls of an empty queue
_BEAT = 20.0  # seconds between broadcasts while the queue is empty; far below any collective timeout
_NOTE = 0.3  # minimum seconds between progress updates, because each is synced to disk
_PROMPTS = 256  # maximum number of cached prompt embeddings
_TIMEOUT = timedelta(hours=2)


class Cancelled(Exception):
    """The client cancelled the video."""


class Late(Exception):
    """The video took longer than the time limit of a job."""


class Worker:
    """Claims jobs, makes their videos, and records the results."""

    def __init__(
        self,
        store: WorkerQueue,
        folders: JobFolders,
        base: Mapping[str, Any],
        models: ModelStore,
        parallel: SingleProcess,
        *,
        name: str,
        timeout: float,
        loras: Loras,
    ) -> None:
        """`base`: the keys common to the inference JSONs of all jobs."""
        self.loras = loras
        self.store, self.folders, self.base, self.models = store, folders, base, models
        self.parallel, self.name, self.timeout = parallel, name, timeout
        self.noted = 0.0

    def run(self) -> None:
        """Process jobs until a signal ends the process."""
        while True:
            check_stop()
            job = self.parallel.run_on_main_and_broadcast(self._next)
            if job is not None:
                self.make(job)

    def _next(self) -> Job | None:
        """Claim the next job. Returns None if no job arrives within 20 seconds."""
        until = time.monotonic() + _BEAT
        while time.monotonic() < until:
            check_stop()
            if (job := self.store.claim(self.name)) is not None:
                return job
            time.sleep(_POLL)
        return None

    def make(self, job: Job) -> None:
        """Make the video of a job and write its files.

        Invalid input fails the job. Any other exception ends the worker.
        """
        error: dict[str, str] | None = None
        try:
            self._generate(job)
        except MindSpeedMMError as problem:
            if not self.parallel.is_shared(problem):
                raise  # only this process failed; the engine kills the others, which wait in a collective
            error = describe_error(translate_error(problem, self.folders.of(job.id)))
        except Cancelled:
            error = {"code": "cancelled"}
        except Late:
            error = late_error(self.timeout)
        if len(self.models.cached_prompts) > _PROMPTS:
            self.models.cached_prompts.clear()
        if self.parallel.is_main:
            self.store.finish(job, error)
            LOGGER.info(
                "%s: %s",
                job.id,
                "completed" if error is None else error.get("message", error["code"]),
                extra=on_every_rank(),
            )

    def _generate(self, job: Job) -> None:
        folder = self.folders.of(job.id)

        job_notes: list[str] = []
        text_len = 0

        def build() -> GenerateJob:
            nonlocal text_len
            planned = build_job(folder, self.base, job.request["fields"], job.request["files"], self.loras)
            config = check_weights(planned)
            text_len = config.trunk.text_len
            job_notes.extend((*planned.notes, *unusual(config, planned.videos[0].sampling)))
            return planned

        def show(request: GenerationRequest, conditions: Conditions) -> None:
            files.write_conditions(request, conditions)
            notes = map(
                translator(folder), (*job_notes, *conditions.notes, *self._long_prompts(request, text_len))
            )
            self.store.add_notes(job, list(dict.fromkeys((*job.notes, *notes))))

        planned = self.parallel.run_on_main_and_broadcast(build)
        files = VideoFiles(self.models, folder, run_settings(planned))
        generate(
            self.models,
            planned.videos[0],
            files.write,
            parallel=self.parallel,
            on_conditions=show,
            open_store=files.open_store,
            hooks=[lambda step: self._note(job, step)],
        )

    def _long_prompts(self, request: GenerationRequest, text_len: int) -> list[str]:
        """Return a note on each prompt that fills all `text_len` tokens that the model reads.

        The prompts must already be embedded.
        """
        rows = ((text, self.models.cached_prompts.get(text)) for text in request.prompts)
        return [
            f"prompt {text[:40]!r}: fills all {text_len} tokens that the model reads; the rest is truncated"
            for text, row in rows
            if row is not None and len(row) >= text_len
        ]

    def _note(self, job: Job, step: Step) -> None:
        """Record the progress of the video. Raises Late or Cancelled, on all processes at the same step."""
        late = time.time() - (job.started_at or time.time()) > self.timeout

        def note() -> str:
            if late:
                return "late"
            now = time.monotonic()
            if now - self.noted > _NOTE or step.index + 1 == step.total:
                self.noted = now
                self.store.advance(job, step.index + 1, step.total)
            return "" if self.store.should_continue(job) else "cancelled"

        end = self.parallel.run_on_main_and_broadcast(note)
        if end:
            raise Late if end == "late" else Cancelled


@one_line_errors
def main(argv: list[str]) -> None:
    """Run a worker with the arguments `SETTINGS.json NAME`.

    The server starts it through `start_worker`. Several workers get torchrun's environment variables.
    """
    settings = read_json_object(argv[0])
    name = f"{argv[1]}.{rank()}"
    data_dir = Path(settings["data_dir"])
    store, folders = JobStore(data_dir), JobFolders(data_dir)
    try:
        serve(settings, store, folders, name)
    except Exception as error:
        kind = "" if isinstance(error, MindSpeedMMError) else f"{type(error).__name__}: "
        store.set_worker(name, "failed", kind + " ".join(str(error).split())[:500])
        raise


def open_worker(
    settings: Mapping[str, Any],
    store: WorkerQueue,
    folders: JobFolders,
    name: str,
    parallel: SingleProcess = SINGLE,
) -> Worker:
    """Load the models and return the worker.

    `settings`: the content of the worker's settings file. Raises the errors of loading the models.
    """
    template = GenerateJob.from_file(Path(settings["template"]))
    text_len = check_weights(template).trunk.text_len
    models = open_models(template, Accelerator.detect(), text_len, parallel, keep_text_encoder=True)
    _ = models.experts  # load now instead of at the first request
    if parallel.is_main:
        _ = models.text_encoder
        models.free_text_encoder()
    return Worker(
        store,
        folders,
        settings["base"],
        models,
        parallel,
        name=name,
        timeout=settings["job_timeout"],
        loras=Loras(settings["loras_dir"]),
    )


def serve(settings: Mapping[str, Any], store: WorkerQueue, folders: JobFolders, name: str) -> None:
    """Load the models, then process jobs. Raises the errors of loading the models."""
    store.set_worker(name, "loading")
    accelerator = Accelerator.detect()
    template = GenerateJob.from_file(Path(settings["template"]))
    accelerator.hint_slow_bf16(template.run.dtype == "bf16", "set dtype of the inference JSON to fp32")
    config = check_weights(template)

    def work(parallel: SingleProcess) -> None:
        worker = open_worker(settings, store, folders, name, parallel)
        store.set_worker(name, "ready")
        worker.run()

    if world_size() == 1:
        work(SINGLE)
    elif template.run.data_parallel:
        with launch(accelerator, _TIMEOUT):
            work(DataParallel())
    else:
        run = template.run
        layout = choose_layout(
            world_size(),
            config.trunk.num_heads,
            guided=True,
            cfg_parallel=run.cfg_parallel,
            context=run.context_parallel_size,
        )
        with launch(accelerator, _TIMEOUT):
            work(ContextParallel(layout, accelerator, share_errors=True))
