"""The trainers that benchmarks/train_step.py compares: ours and other projects', on the same sample."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindspeed_mm.models.wan.config import BRANCH, PredictorConfig, VaceConfig
from mindspeed_mm.models.wan.shapes import layout

Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """What is trained: sizes, one sample, dtype."""

    config: VaceConfig
    grid: tuple[int, int, int]  # latents (R+F, h, w)
    text: int  # caption tokens
    dtype: str  # bf16 | fp32
    trainable: str
    device: str | None
    residual_dtype: str = "fp32"  # of our residual stream; the peer's is in the dtype of its products


@dataclass(frozen=True)
class Variant:
    """One way to train it."""

    recompute: (
        str  # a mode for all blocks, or patterns as in fsdp2_config.yaml: blocks.{0-4}=selective,head=none
    )
    compiled: bool

    def plan(self, config: VaceConfig) -> dict[str, str]:
        """Map module names to modes, without modules that recompute nothing."""
        from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
        from mindspeed_mm.distributed.patterns import recompute_plan

        numbers = {"blocks": config.trunk.num_layers, "vace_blocks": len(config.vace_layers)}
        names = [f"{kind}.{i}" for kind, count in numbers.items() for i in range(count)]
        fsdp = Fsdp2Config(recompute_modules=self.patterns())
        return dict(recompute_plan(names, list(self.patterns()), fsdp, ParallelConfig()))

    def patterns(self) -> dict[str, Any]:
        """What fsdp2_config.yaml calls recompute_modules."""
        if "=" not in self.recompute:
            return {"blocks.{*}": self.recompute, "vace_blocks.{*}": self.recompute}
        return dict(item.split("=", 1) for item in re.split(r",(?![^{]*})", self.recompute))

    @property
    def name(self) -> str:
        """`full, compiled`"""
        return self.recompute + (", compiled" if self.compiled else "")


class Trainer:
    """Forward, loss, backward, clipped AdamW: the same for both."""

    def __init__(self, model: Any, forward: Callable[[], Any], inputs: dict[str, Any]) -> None:
        import torch

        self.model, self.forward, self.target = model, forward, inputs["target"]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=5e-5, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, fused=True
        )

    def step(self) -> float:
        """Return the loss before the update."""
        import torch

        loss = (self.forward().float() - self.target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def held(self) -> int:
        """Bytes of weights and moments, which stay between steps."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in [*self.model.parameters(), *moments])


def make_inputs(case: Case, generator: Any, device: Any) -> dict[str, Any]:
    """One sample: model inputs and the velocity to be learnt."""
    import torch

    trunk = case.config.trunk

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device)

    return {
        "latents": normal(1, trunk.in_dim, *case.grid),
        "timestep": torch.tensor([700.0], device=device),
        "prompt_embeds": normal(1, case.text, trunk.text_dim),
        "vace_context": normal(1, case.config.vace_in_dim, *case.grid),
        "target": normal(1, trunk.out_dim, *case.grid),
    }


class RandomWeights:
    """Equal weights for both, drawn by name. None is zero, so that what is compared reaches the loss."""

    def __init__(self, config: VaceConfig) -> None:
        from torch import Size

        self.shapes = {name: Size(shape) for name, shape in layout(config).items()}

    def read(self, name: str) -> Any:
        """The whole weight, fp32."""
        import torch

        from mindspeed_mm.training.build import initial_weight

        weight = initial_weight(name, self.shapes[name], 0)
        if weight.any():
            return weight
        return 0.02 * torch.randn(
            weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
        )


def our_trainer(case: Case, variant: Variant, inputs: dict[str, Any], accelerator: Any) -> Trainer:
    from mindspeed_mm.distributed.config import Fsdp2Config, ParallelConfig
    from mindspeed_mm.distributed.mesh import build_mesh
    from mindspeed_mm.training.build import build_model

    parallel = ParallelConfig()
    fsdp = Fsdp2Config(param_dtype=case.dtype, compile=variant.compiled, recompute_modules=variant.patterns())
    sizes = {**case.config.trunk.model_dump(), "dtype": case.dtype, "trainable": case.trainable}
    sizes["residual_dtype"] = case.residual_dtype
    branch = {"vace_layers": case.config.vace_layers, "in_dim": case.config.vace_in_dim}
    predictor = PredictorConfig(**sizes, vace_dit=branch)
    mesh = build_mesh(parallel, accelerator, fsdp)
    model = build_model(predictor, parallel, fsdp, mesh, accelerator, source=RandomWeights(case.config))
    return Trainer(model, lambda: model(**_without_target(inputs)), inputs)


def peer_trainer(case: Case, peer: str, inputs: dict[str, Any], accelerator: Any) -> Trainer:
    """Another project's model.

    The same weights train, its own gradient checkpointing, the caption padded to its full length.
    """
    import torch
    import torch.nn.functional as F

    from mindspeed_mm.models.transforms.match import is_trainable
    from mindspeed_mm.models.wan.state_dict import KEY_MAPS

    with torch.device(accelerator.device):
        model, call = PEERS[peer](case.config)
    names, weights = KEY_MAPS["diffusers" if peer == "diffusers" else "official"], RandomWeights(case.config)
    half = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    for theirs, parameter in model.named_parameters():
        name = names.to_ours(theirs.removeprefix("dit.").removeprefix("vace."))
        parameter.data.copy_(weights.read(name))
        parameter.requires_grad_(is_trainable(name, case.trainable, BRANCH))
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(half)
    model.train()
    text = F.pad(inputs["prompt_embeds"], (0, 0, 0, case.config.trunk.text_len - case.text))
    latents, text, control = (value.to(half) for value in (inputs["latents"], text, inputs["vace_context"]))

    def forward() -> Any:
        with torch.autocast(accelerator.kind, torch.bfloat16, enabled=case.dtype == "bf16"):
            return call(latents, inputs["timestep"], text, control)

    return Trainer(model, forward, inputs)


def _diffusers(config: VaceConfig) -> tuple[Any, Callable[..., Any]]:
    """Return the model of diffusers and a function that calls it as its pipeline does."""
    from diffusers import WanVACETransformer3DModel

    trunk = config.trunk
    model = WanVACETransformer3DModel(
        patch_size=trunk.patch_size,
        num_attention_heads=trunk.num_heads,
        attention_head_dim=trunk.head_dim,
        in_channels=trunk.in_dim,
        out_channels=trunk.out_dim,
        text_dim=trunk.text_dim,
        freq_dim=trunk.freq_dim,
        ffn_dim=trunk.ffn_dim,
        num_layers=trunk.num_layers,
        vace_layers=list(config.vace_layers),
        vace_in_channels=config.vace_in_dim,
    )
    model.enable_gradient_checkpointing()

    def call(latents: Any, timestep: Any, text: Any, control: Any) -> Any:
        return model(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=text,
            control_hidden_states=control,
            return_dict=False,
        )[0]

    return model, call


def _diffsynth(config: VaceConfig) -> tuple[Any, Callable[..., Any]]:
    """Return the two models of DiffSynth-Studio and the function that its training calls with them."""
    import torch
    from diffsynth.models.wan_video_dit import WanModel
    from diffsynth.models.wan_video_vace import VaceWanModel
    from diffsynth.pipelines.wan_video import model_fn_wan_video

    trunk = config.trunk
    sizes = {
        "patch_size": trunk.patch_size,
        "has_image_input": False,
        "dim": trunk.hidden_size,
        "num_heads": trunk.num_heads,
        "ffn_dim": trunk.ffn_dim,
        "eps": trunk.eps,
    }
    dit = WanModel(
        in_dim=trunk.in_dim,
        out_dim=trunk.out_dim,
        text_dim=trunk.text_dim,
        freq_dim=trunk.freq_dim,
        num_layers=trunk.num_layers,
        **sizes,
    )
    vace = VaceWanModel(vace_layers=tuple(config.vace_layers), vace_in_dim=config.vace_in_dim, **sizes)

    def call(latents: Any, timestep: Any, text: Any, control: Any) -> Any:
        return model_fn_wan_video(
            dit,
            vace=vace,
            latents=latents,
            timestep=timestep,
            context=text,
            vace_context=control,
            use_gradient_checkpointing=True,
        )

    return torch.nn.ModuleDict({"dit": dit, "vace": vace}), call


PEERS = {"diffusers": _diffusers, "diffsynth": _diffsynth}  # by the name of the package
MODULES = {"diffusers": "diffusers", "diffsynth": "diffsynth.pipelines.wan_video"}  # that each imports


def _without_target(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "target"}
