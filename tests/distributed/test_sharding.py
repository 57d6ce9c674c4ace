"""Any number of ranks, any sharding: the same training."""

import pytest
import torch

from tests.distributed.jobs import Setup, plain, train

STEPS = 3


@pytest.fixture(scope="module")
def reference():
    return plain(STEPS)


@pytest.mark.parametrize(
    ("ranks", "setup"),
    [
        pytest.param(1, Setup(), id="1 rank"),
        pytest.param(2, Setup(), id="2 ranks"),
        pytest.param(4, Setup(), id="4 ranks"),
        pytest.param(4, Setup(fsdp={"sharding_size": 2}), id="2 copies over 2 ranks each"),
        pytest.param(2, Setup(fsdp={"sharding_size": 1}), id="a copy on each rank"),
        pytest.param(2, Setup(cp=2), id="cp 2"),
        pytest.param(4, Setup(cp=2), id="cp 2, dp 2"),
        pytest.param(4, Setup(cp=4), id="cp 4"),
        pytest.param(4, Setup(cp=2, fsdp={"sharding_size": 2}), id="cp 2, dp 2, 2 copies"),
    ],
)
def test_losses_and_weights_match_plain_training(world, reference, ranks, setup):
    losses, weights = world.run(ranks, train, setup, STEPS)[0]

    assert losses == pytest.approx(reference[0], abs=1e-6)
    for name, weight in reference[1].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5, msg=name)
