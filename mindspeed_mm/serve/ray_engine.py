"""`vace serve --engine ray`: the workers are replicas of a Ray Serve deployment on a cluster.

The HTTP API, its guard and the queue stay in this process. Ray places, monitors and restarts the replicas.
Does not import torch.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from mindspeed_mm.files import read_json_object
from mindspeed_mm.log import get_logger
from mindspeed_mm.serve.engine import Engine, late_error
from mindspeed_mm.serve.ray_worker import Queue, Replica

LOGGER = get_logger(__name__)
_POLL = 0.5
_LATE = 60.0  # seconds beyond job_timeout after which a video that hangs within a step fails
_LOST = 20.0  # seconds without a heartbeat after which a replica's job is requeued
_DEVICES = ("GPU", "NPU")  # Ray's resource names; a replica needs one device


class RayEngine(Engine):
    """A Ray Serve deployment. The setting `devices` is the number of its replicas."""

    def _serve_once(self) -> None:
        import ray

        self.store.release(())  # requeue the jobs of an earlier server
        self._connect()
        queue = None
        try:
            here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            )
            actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Queue)
            queue = actor.remote(self.worker["data_dir"])
            self._deploy(queue)
            self._follow(queue)
        finally:
            self._remove(queue)

    @property
    def _app(self) -> str:
        return f"vace-{os.getpid()}"

    def _connect(self) -> None:
        """Connect to the Ray cluster, or start one on this machine."""
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self.settings.ray_address is not None:
            ray.init(address=self.settings.ray_address, ignore_reinit_error=True, **quiet)
        else:
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                ignore_reinit_error=True,
                **quiet,
            )

    def _deploy(self, queue: Any) -> None:
        """Start the replicas, and wait until all have loaded the models. Raises Ray's error if one fails."""
        import ray
        from ray import serve

        there = ray.cluster_resources()
        device = next((name for name in _DEVICES if there.get(name)), None)
        options: dict[str, Any] = {"num_cpus": 1}
        if device == "GPU":
            options["num_gpus"] = 1
        elif device is not None:
            options["resources"] = {device: 1}
        deployment = serve.deployment(Replica).options(
            name="videos",
            num_replicas=self.settings.devices,
            ray_actor_options=options,
            health_check_period_s=2,
            graceful_shutdown_timeout_s=2,
        )
        template = read_json_object(self.worker["template"])
        serve.start(proxy_location="Disabled")
        serve.run(deployment.bind(dict(self.worker), template, queue), name=self._app, route_prefix=None)

    def _follow(self, queue: Any) -> None:
        """Monitor the replicas until the server stops.

        Requeues the jobs of lost replicas, fails videos that take too long, and deletes expired jobs.
        """
        import ray

        while not self._over.wait(_POLL) and not self.check_queue():
            for name in ray.get(queue.lost.remote(_LOST)):
                self.restarts += 1
                LOGGER.warning("%s: lost; its video is tried again", name)
                for job in self.store.release((name,), only=name):
                    LOGGER.warning("%s: failed: its worker died %d times", job.id, job.attempts)
            for job in self.store.overdue(self.settings.job_timeout + _LATE):
                LOGGER.warning("%s: its worker hangs", job.id)
                self.store.finish(job, late_error(self.settings.job_timeout))
            self.state()
            self.clean()

    def _remove(self, queue: Any) -> None:
        import ray
        from ray import serve

        with suppress(Exception):
            serve.delete(self._app)
        with suppress(Exception):
            if queue is not None:
                ray.kill(queue)
        with suppress(Exception):
            ray.shutdown()
