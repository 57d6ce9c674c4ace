"""Inside the sharding: what is kept, gathered, frozen, and in which dtype."""

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_mm.distributed.fsdp import fsdp_units
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.training.build import fill_parameters
from tests.distributed.jobs import FromModule, Setup, gradients, optimizer, sample, step, whole
from tests.support.tiny import tiny_transformer

BLOCKS = [f"blocks.{i}" for i in range(4)] + [f"vace_blocks.{i}" for i in range(2)]


def count_forwards(setup):
    """Count how often each block's attention runs in one forward and backward.

    Returns {block: (self-attention, attend)}.
    """
    model, _ = setup.build()
    counts = {name: [0, 0] for name in BLOCKS}

    def counted(function, name, place):
        def run(*args):
            counts[name][place] += 1
            return function(*args)

        return run

    for name in BLOCKS:
        attention = model.get_submodule(name).self_attn
        attention.forward = counted(attention.forward, name, 0)
        attention.attend = counted(attention.attend, name, 1)
    inputs, target = sample(0)
    (model(**inputs) - target).square().mean().backward()
    return {name: tuple(count) for name, count in counts.items()}


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_every_block_is_recomputed_on_request(world, mode):
    setup = Setup(trainable="all", fsdp={"recompute_modules": {"blocks.{*}": mode, "vace_blocks.{*}": mode}})
    assert world.run(1, count_forwards, setup)[0] == dict.fromkeys(BLOCKS, (2, 2))
    assert world.run(1, count_forwards, Setup(trainable="all"))[0] == dict.fromkeys(BLOCKS, (1, 1))


def test_megatrons_flags_choose_the_blocks(world):
    flags = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
    counts = world.run(1, count_forwards, Setup(trainable="all", parallel=flags))[0]
    assert {name for name, (forwards, _) in counts.items() if forwards == 2} == {"blocks.0", "vace_blocks.0"}


def test_first_trunk_block_is_not_recomputed_for_branch(world):
    """Nothing before the first hint needs a gradient, so there is no backward through it."""
    flags = {"recompute_granularity": "full"}
    counts = world.run(1, count_forwards, Setup(parallel=flags))[0]
    assert counts["blocks.0"] == (1, 1)
    assert all(counts[name] == (2, 2) for name in BLOCKS[1:])


class CountAttention(TorchDispatchMode):
    """Counts attention kernels that really run: recomputation takes kept outputs before they come here."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func) == "aten._scaled_dot_product_flash_attention_for_cpu.default"
        return func(*args, **(kwargs or {}))


def kernels(mode):
    """Attention kernels in one forward and backward."""
    model, _ = Setup(trainable="all", parallel={"recompute_granularity": mode} if mode else {}).build()
    inputs, target = sample(0)
    with CountAttention() as counter:
        (model(**inputs) - target).square().mean().backward()
    return counter.count


def test_selective_keeps_attention_outputs_and_full_does_not(world):
    plain, selective, full = (world.run(1, kernels, mode)[0] for mode in (None, "selective", "full"))
    assert (plain, selective, full) == (12, 12, 24)  # six blocks, self- and cross-attention


@pytest.mark.parametrize(
    "setup",
    [
        pytest.param(Setup(parallel={"recompute_granularity": "full"}), id="full"),
        pytest.param(Setup(parallel={"recompute_granularity": "selective"}), id="selective"),
        pytest.param(
            Setup(fsdp={"num_to_forward_prefetch": 2, "num_to_backward_prefetch": 2}), id="prefetch"
        ),
        pytest.param(Setup(fsdp={"reshard_after_forward": False}), id="no reshard"),
        pytest.param(Setup(fsdp={"ignored_modules": ["patch_embedding", "head"]}), id="ignored modules"),
        pytest.param(Setup(fsdp={"offload_to_cpu": True, "pin_memory": False}), id="offload"),
        pytest.param(
            Setup(
                fsdp={"sub_modules_to_wrap": ["predictor.wan_dit.blocks.{0-2}", "vace_dit.vace_blocks.{*}"]}
            ),
            id="old prefixes",
        ),
    ],
)
def test_no_setting_changes_the_gradients(world, setup):
    wanted_loss, wanted = world.run(1, gradients, Setup())[0]
    loss, found = world.run(2, gradients, setup)[0]
    assert loss == pytest.approx(wanted_loss, abs=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)


def frozen_bytes():
    """Train two steps in bf16.

    Returns the changed weights, frozen weights that have gradients or masters, and the units' dtypes.
    """
    model, mesh = Setup(dtype="bf16").build()
    before = {name: whole(p) for name, p in model.named_parameters()}
    optim = optimizer(model)
    for iteration in range(2):
        step(model, mesh, optim, iteration, 2)
    after = dict(model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], whole(after[name]))}
    dtypes = {name: (p.requires_grad, p.dtype) for name, p in after.items()}
    return changed, dtypes, set(fsdp_units(model))


def test_frozen_trunk_keeps_bytes_trained_has_fp32_masters(world):
    changed, dtypes, units = world.run(2, frozen_bytes)[0]

    trained = {name for name in dtypes if name.startswith("vace_")}
    assert changed == trained
    for name, (requires_grad, dtype) in dtypes.items():
        kept = name.split(".")[0] in ("time_embedding", "time_projection", "head")
        assert requires_grad == (name in trained)
        assert dtype == (torch.float32 if name in trained or kept else torch.bfloat16), name
    assert {"vace_patch_embedding", "time_embedding", "time_projection", "head", *BLOCKS} <= units


def dtypes_seen():
    """In bf16: the dtypes of timestep, residual, time path and products as modules see them."""
    model, _ = Setup(dtype="bf16").build()
    seen = {}

    def look(name):
        def hook(module, args, output):
            out = output[0] if isinstance(output, tuple) else output
            weight = getattr(module, "weight", None)
            seen[name] = (args[0].dtype, out.dtype, None if weight is None else weight.dtype)

        return hook

    for name in ("time_embedding.0", "blocks.1", "vace_blocks.1", "blocks.1.self_attn.q", "head"):
        model.get_submodule(name).register_forward_hook(look(name))
    inputs, _ = sample(0)
    inputs["timestep"] = torch.tensor([937.5])
    steps = []
    kept = model.register_forward_pre_hook(
        lambda _, args, kwargs: steps.append(kwargs["timestep"]), with_kwargs=True
    )
    model(**inputs)
    kept.remove()
    return seen, float(steps[0]), steps[0].dtype


def test_timestep_and_residual_stay_fp32_under_bf16_products(world):
    seen, timestep, dtype = world.run(2, dtypes_seen)[0]
    fp32, bf16 = torch.float32, torch.bfloat16
    assert (timestep, dtype) == (937.5, fp32)
    assert seen["time_embedding.0"] == (fp32, fp32, fp32)
    assert seen["blocks.1"][:2] == seen["vace_blocks.1"][:2] == (fp32, fp32)
    assert seen["blocks.1.self_attn.q"] == (bf16, bf16, bf16)
    assert seen["head"][:2] == (fp32, fp32)


def reductions(setup, micro_batches):
    """How many reduce-scatters one iteration issues."""
    model, mesh = setup.build()
    optim = optimizer(model)
    step(model, mesh, optim, 0, mesh.dp_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, mesh, optim, 0, mesh.dp_size * micro_batches)
    return sum(event.count for event in profile.key_averages() if "_reduce_scatter_base_" in event.key)


def test_accumulation_reduces_once(world):
    once = world.run(2, reductions, Setup(), 1)[0]
    assert once > 0
    assert world.run(2, reductions, Setup(), 3)[0] == once


def refusal(setup):
    """What building says of settings that do not fit the mesh."""
    with pytest.raises(ConfigError) as error:
        setup.build()
    return str(error.value)


def test_sharding_size_must_divide_the_mesh(world):
    assert "reshard_after_forward: 3" in world.run(2, refusal, Setup(fsdp={"reshard_after_forward": 3}))[0]


def gathered(setup):
    """First parts of the names of weights that FSDP2 gathers before they are used."""
    model, _ = setup.build()
    return {name.split(".")[0] for name, p in model.named_parameters() if isinstance(p, DTensor)}


BRANCH_PARTS, FP32_PARTS = (
    {"vace_blocks", "vace_patch_embedding"},
    {"time_embedding", "time_projection", "head"},
)
TRUNK_PARTS = {"blocks", "patch_embedding", "text_embedding", *FP32_PARTS}


@pytest.mark.parametrize(
    ("ranks", "setup", "wanted"),
    [
        pytest.param(1, Setup(), set(), id="one rank, fp32: nothing"),
        pytest.param(1, Setup(dtype="bf16"), BRANCH_PARTS, id="one rank, bf16: masters are cast"),
        pytest.param(
            1, Setup(dtype="bf16", trainable="all"), BRANCH_PARTS | TRUNK_PARTS, id="all trains in one way"
        ),
        pytest.param(
            1,
            Setup(fsdp={"offload_to_cpu": True, "pin_memory": False}),
            BRANCH_PARTS | TRUNK_PARTS,
            id="host",
        ),
        pytest.param(
            2, Setup(fsdp={"sharding_size": 1}), BRANCH_PARTS, id="a copy on each rank: gradients are summed"
        ),
        pytest.param(2, Setup(), BRANCH_PARTS | TRUNK_PARTS, id="two ranks"),
    ],
)
def test_only_what_needs_a_gather_or_a_cast_is_wrapped(world, ranks, setup, wanted):
    assert world.run(ranks, gathered, setup)[0] == wanted


def test_bf16_on_one_rank_is_bf16_on_two(world):
    """One rank uses its frozen weights in place, two gather them: the same bytes either way."""
    _, alone = world.run(1, gradients, Setup(dtype="bf16"))[0]
    _, together = world.run(2, gradients, Setup(dtype="bf16"))[0]
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=0, atol=0, msg=name)


class CountCopied(TorchDispatchMode):
    """Counts weights that are copied into place, or into new memory on the way there; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.copy_.default:
            self.elements += args[1].numel()
        elif isinstance(answer, torch.Tensor) and answer.is_floating_point() and not function.is_view:
            self.elements += answer.numel()
        return answer


def filled():
    """Elements that this rank copies from the source, that it holds, and of the whole model."""
    model, _ = Setup().build()
    source = FromModule(tiny_transformer(1))
    with CountCopied() as count:
        fill_parameters(model, source, seed=0)
    parameters = list(model.parameters())
    assert all(torch.equal(whole(p), source.read(name)) for name, p in model.named_parameters())
    held = [p.to_local().numel() for p in parameters]
    sums = sum(size > 0 for size in held)  # one number a weight, which tells whether it is finite
    return count.elements - sums, sum(held), sum(p.numel() for p in parameters)


def test_rank_copies_no_more_than_its_shard(world):
    ranks = world.run(4, filled)
    total = ranks[0][2]
    assert sum(held for _, held, _ in ranks) == total
    assert max(held for _, held, _ in ranks) < 0.3 * total
    assert [copied for copied, _, _ in ranks] == [held for _, held, _ in ranks]
