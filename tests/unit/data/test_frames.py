"""Frame choice and target size: closed formulas, for any length and any size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindspeed_mm.data.frames import align, choose_frames, target_size
from mindspeed_mm.data.probe import ClipInfo
from mindspeed_mm.errors import DataError
from tests.support.errors import raises


def even(count, fps):
    return [i / fps for i in range(count)]


def chosen(count, fps=16.0, num_frames=81, train_fps=16.0, **policies):
    return choose_frames(
        even(count, fps), duration=count / fps, num_frames=num_frames, fps=train_fps, **policies
    )


@pytest.mark.parametrize(
    ("count", "kept", "policy"),
    [(80, 77, "keep"), (81, 81, "exact"), (82, 81, "trim"), (85, 81, "trim"), (1, 1, "keep")],
)
def test_long_clip_gives_exactly_num_frames(count, kept, policy):
    choice = chosen(count)
    assert choice.indices == tuple(range(kept))
    assert choice.policy == policy
    assert choice.fps == 16


def test_24_fps_clip_is_sampled_by_time():
    choice = chosen(200, fps=24.0)
    assert choice.indices == tuple(i * 24 // 16 for i in range(81))


def test_slow_clip_repeats_frames():
    assert chosen(41, fps=8.0).indices == tuple(i // 2 for i in range(81))


def test_variable_rate_is_sampled_by_what_is_on_screen():
    choice = choose_frames([0, 0.01, 0.02, 0.3, 0.31], duration=0.4, num_frames=5, fps=10)
    assert choice.indices == (0,)  # four moments, of which 4k+1 = 1 is kept
    choice = choose_frames([0, 0.01, 0.02, 0.3, 0.31], duration=0.5, num_frames=5, fps=10)
    assert choice.indices == (0, 2, 2, 3, 4)


def test_timestamps_in_milliseconds_lose_no_frame():
    rounded = [round(i / 16, 3) for i in range(81)]  # Matroska
    assert choose_frames(rounded, duration=5.063, num_frames=81, fps=16).indices == tuple(range(81))


@pytest.mark.parametrize(
    ("policy", "indices"),
    [
        ("keep", [0, 1, 2, 3, 4]),
        ("pad", [0, 1, 2, 3, 4, 5, 5, 5, 5]),
        ("resample", [0, 0, 1, 1, 2, 3, 3, 4, 5]),
    ],
)
def test_short_clip_is_kept_padded_or_resampled(policy, indices):
    choice = chosen(6, num_frames=9, short_clip=policy)
    assert list(choice.indices) == indices
    assert choice.policy == policy


def test_short_clip_can_be_rejected():
    with raises(DataError, 6, 16, 9, 5, "short_clip"):
        chosen(6, num_frames=9, short_clip="reject")


def test_long_clip_can_be_rejected():
    with raises(DataError, 12, 16, 9, "long_clip"):
        chosen(12, num_frames=9, long_clip="reject")


def test_long_clip_can_be_resampled_over_its_whole_length():
    choice = chosen(161, num_frames=81, long_clip="resample")
    assert choice.indices == tuple(range(0, 161, 2))
    assert choice.fps == pytest.approx(8)


@given(
    count=st.integers(1, 400),
    fps=st.floats(5, 120),
    train_fps=st.floats(5, 60),
    k=st.integers(0, 30),
    short=st.sampled_from(["keep", "pad", "resample"]),
    long=st.sampled_from(["trim", "resample"]),
)
def test_every_clip_gives_4k_plus_1_rising_frames(count, fps, train_fps, k, short, long):
    choice = chosen(count, fps, 4 * k + 1, train_fps, short_clip=short, long_clip=long)
    assert len(choice.indices) % 4 == 1
    assert len(choice.indices) <= 4 * k + 1
    assert list(choice.indices) == sorted(choice.indices)
    assert choice.indices[0] == 0
    assert choice.indices[-1] < count
    assert short == "keep" or len(choice.indices) == 4 * k + 1


@pytest.mark.parametrize(
    ("size", "most", "wanted"),
    [
        ((480, 832), 399360, (480, 832)),
        ((1080, 1920), 399360, (480, 832)),
        ((1920, 1080), 399360, (848, 464)),  # portrait stays portrait
        ((720, 1280), 921600, (720, 1280)),
        ((1280, 720), 921600, (1280, 720)),
        ((100, 100), 399360, (96, 96)),
        ((16, 16), 399360, (16, 16)),
    ],
)
def test_target_sizes(size, most, wanted):
    assert target_size(*size, most) == wanted


@given(height=st.integers(16, 4400), width=st.integers(16, 4400), most=st.integers(256, 2_000_000))
def test_target_is_whole_tokens_and_within_the_bound(height, width, most):
    rows, columns = target_size(height, width, most)
    assert rows % 16 == columns % 16 == 0
    assert min(rows, columns) >= 16
    if 0.2 < height / width < 5 and most > 20_000:
        assert rows * columns <= most * 1.001
        assert rows / columns == pytest.approx(height / width, rel=0.35)


def test_clip_smaller_than_a_token_is_an_error():
    with raises(DataError, "20x8", "16x16"):
        target_size(8, 20, 399360)


def clip(count, fps=16.0, timed=True):
    return ClipInfo(
        path="x", num_frames=count, height=64, width=64, fps=fps, duration=count / fps, timed=timed
    )


def test_streams_of_equal_length_pair_frame_by_frame():
    choice = chosen(50, fps=30.0, num_frames=17)
    assert align("src_video", clip(50, 12), clip(50, 30), choice) == choice.indices
    assert align("src_video_mask", clip(50, timed=False), clip(50, 30), choice) == choice.indices


def test_streams_of_two_rates_go_by_time():
    choice = chosen(60, fps=30.0, num_frames=17)
    assert align("src_video", clip(32, 16), clip(60, 30), choice) == tuple(range(17))


def test_still_mask_holds_for_every_frame():
    assert align("src_video_mask", clip(1, timed=False), clip(40), chosen(40, num_frames=5)) == (0,) * 5


def test_stream_that_ends_early_is_rejected_with_both_counts():
    with raises(DataError, "src_video_mask", 40, 81):
        align("src_video_mask", clip(40), clip(81), chosen(81))
    with raises(DataError, 80, 81):
        align("src_video", clip(80, timed=False), clip(81), chosen(81, num_frames=5))
