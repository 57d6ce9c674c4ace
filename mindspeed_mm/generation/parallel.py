"""Distributes work across processes: a single process, one video per process, or all on one video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mindspeed_mm.accelerator import Accelerator
from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
from mindspeed_mm.distributed.fsdp import shard_model
from mindspeed_mm.distributed.launch import raise_on_all_ranks
from mindspeed_mm.distributed.mesh import Mesh, build_mesh
from mindspeed_mm.distributed.sequence import apply_context_parallel
from mindspeed_mm.distributed.shards import copy_local
from mindspeed_mm.errors import MindSpeedMMError, NonFiniteError
from mindspeed_mm.generation.guidance import VelocityFn, apply_cfg, guided_velocity
from mindspeed_mm.generation.layout import Layout
from mindspeed_mm.models.finite import FiniteWeights
from mindspeed_mm.models.load_model import build_on_meta
from mindspeed_mm.models.source import OpenedModel
from mindspeed_mm.models.spec import VACE, ModelSpec
from mindspeed_mm.models.transforms.quantize import quantize_blocks
from mindspeed_mm.models.wan.vace import VaceTransformer
from mindspeed_mm.ops.quantized import SCALE, QuantFormat, fill_scale, quantized_layers

T = TypeVar("T")


class SingleProcess:
    """A single process, and the base class of the parallel modes."""

    is_main = True  # the main process reads sources, encodes, decodes and writes

    def guide(
        self, predict: VelocityFn, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, scale: float
    ) -> Tensor:
        """Return the guided velocity."""
        return guided_velocity(predict, prompt_embeds, negative_prompt_embeds, scale)

    def check(self, fn: Callable[[], None]) -> None:
        """Call `fn`, which checks the inputs before any model is loaded."""
        fn()

    def is_shared(self, error: MindSpeedMMError) -> bool:
        """Return whether all processes of this video raised `error` and can therefore continue together."""
        return True

    def run_on_main_and_broadcast(self, fn: Callable[[], T]) -> T:
        """Return the result of `fn`."""
        return fn()

    def run_on_main(self, fn: Callable[[], T]) -> T | None:
        """Return the result of `fn` on the main process, and None on the others."""
        return fn()


SINGLE = SingleProcess()


class DataParallel(SingleProcess):
    """One of torchrun's processes, each of which generates its own videos. Must be used inside `launch`."""

    def check(self, fn: Callable[[], None]) -> None:
        """Call `fn` on every process. If it fails, all raise the error of the lowest failing rank."""
        raise_on_all_ranks(fn)


class ContextParallel(SingleProcess):
    """All torchrun processes on one video. `layout` divides them between tokens and guidance."""

    def __init__(
        self,
        layout: Layout,
        accelerator: Accelerator,
        mesh: Mesh | None = None,
        *,
        share_errors: bool = False,
    ) -> None:
        """Create the process groups, or use those of an existing `mesh`, as in training.

        Must be called inside `launch`. For `share_errors`, see `run_on_main_and_broadcast`.
        """
        parallel = ParallelConfig(context_parallel_size=layout.context, distributed_timeout_minutes=120)
        self.accelerator = accelerator
        self.mesh = build_mesh(parallel, accelerator) if mesh is None else mesh
        self.layout = layout
        self.is_main = self.mesh.rank == 0
        self.share_errors = share_errors
        self._shared: MindSpeedMMError | None = None  # the last error that was sent to all processes

    def guide(
        self, predict: VelocityFn, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, scale: float
    ) -> Tensor:
        """Return the guided velocity.

        If there are two halves, each predicts for one prompt, and both gather both velocities.
        """
        if self.layout.halves == 1 or scale == 1 or negative_prompt_embeds is None:
            return super().guide(predict, prompt_embeds, negative_prompt_embeds, scale)
        velocity = predict(prompt_embeds if self.mesh.dp_rank == 0 else negative_prompt_embeds).contiguous()
        conditional, unconditional = velocities = [torch.empty_like(velocity) for _ in range(2)]
        dist.all_gather(velocities, velocity, group=self.mesh.dp_group)
        return apply_cfg(conditional, unconditional, scale)

    def is_shared(self, error: MindSpeedMMError) -> bool:
        """Return whether all processes of this video raised `error`.

        The latents are equal on all processes, so all raise NonFiniteError together.
        """
        return error is self._shared or isinstance(error, NonFiniteError)

    def check(self, fn: Callable[[], None]) -> None:
        """Call `fn` on the main process. An error ends all processes."""
        self.run_on_main_and_broadcast(fn)

    def run_on_main(self, fn: Callable[[], T]) -> T | None:
        """Return the result of `fn` on the main process, and None on the others, which wait for it.

        Errors are handled as in `run_on_main_and_broadcast`.
        """
        kept: list[T] = []
        self.run_on_main_and_broadcast(lambda: kept.append(fn()))
        return kept[0] if kept else None

    def run_on_main_and_broadcast(self, fn: Callable[[], T]) -> T:
        """Call `fn` on the main process, and return its result on all processes. Tensors must be on the host.

        NonFiniteError is raised on every process, so that the caller can continue. With `share_errors`, this
        applies to every MindSpeedMMError. Any other error ends all processes, and the main process reports
        it.
        """
        value: T | None = None
        failed: MindSpeedMMError | None = None
        if self.is_main:
            try:
                value = fn()
            except MindSpeedMMError as error:
                failed = error
        is_shared = self.share_errors or isinstance(failed, NonFiniteError)
        sent = [value, failed if is_shared else failed is not None]
        dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
        if failed is not None:
            self._shared = failed if is_shared else None
            raise failed
        if isinstance(sent[1], MindSpeedMMError):
            self._shared = sent[1]
            raise sent[1]
        if sent[1]:
            raise SystemExit(1)
        received: Any = sent[0]
        return cast(T, received)

    def share_tokens(self, model: nn.Module) -> None:
        """Apply context parallelism to `model` within each half of the processes."""
        apply_context_parallel(model, self.mesh.cp_group)

    def load_sharded(
        self,
        opened: OpenedModel,
        dtype: torch.dtype,
        quantize: QuantFormat | None = None,
        spec: ModelSpec = VACE,
    ) -> VaceTransformer:
        """Load a transformer sharded over all processes. Each process reads only its part of the files."""
        source, sizes = opened
        model = build_on_meta(sizes, spec)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(
                torch.float32 if name.split(".")[0] in spec.fp32_modules else dtype
            )
        model.eval().requires_grad_(False)
        if quantize is not None:
            quantize_blocks(model, quantize, spec)
        self.share_tokens(model)
        settings = Fsdp2Config(
            param_dtype="fp32" if dtype == torch.float32 else "bf16", num_to_forward_prefetch=1
        )
        shard_model(model, spec.units, settings, self.mesh, fp32_modules=spec.fp32_modules)
        model.to_empty(device=self.accelerator.device)
        finite = FiniteWeights(source.path)
        in_8_bits = quantized_layers(model)
        for name, parameter in model.named_parameters():
            whole = source.read(name)
            if (layer := in_8_bits.get(name)) is not None:
                whole = fill_scale(layer, whole)
                finite.check(name, layer.get_buffer(SCALE))
            finite.check(name, copy_local(parameter, whole))
        raise_on_all_ranks(finite.raise_if_nonfinite)
        return model
