"""Every clip once per epoch, the same batch however it is shared, and windows of row groups that a reader can hold."""

from __future__ import annotations

import numpy as np
import pytest

from simda.training.clip_order import BucketOrder, ClipOrder, Turn, crop_start


def rows_of(order: ClipOrder, num_steps: int, batch_size: int) -> list[int]:
    return [clip.row for step in range(num_steps) for clip in order.batch(step, batch_size)]


def test_each_epoch_is_another_permutation_and_batches_run_over_its_end():
    rows = rows_of(ClipOrder(np.zeros(10), seed=0, window_clips=100), num_steps=5, batch_size=4)
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_a_batch_larger_than_the_table_repeats_clips():
    assert sorted(rows_of(ClipOrder(np.zeros(2), seed=0, window_clips=9), 1, 6)) == [0, 0, 0, 1, 1, 1]


def test_ranks_share_one_batch():
    order = ClipOrder(np.zeros(10), seed=1, window_clips=100)
    whole = order.batch(3, 4)
    assert [clip.place for clip in whole] == [0, 1, 2, 3]
    assert order.batch(3, 4, rank=0, world_size=2) + order.batch(3, 4, rank=1, world_size=2) == whole


def test_the_order_follows_the_seed_and_not_the_row_groups_of_a_small_table():
    rows = rows_of(ClipOrder(np.zeros(50), seed=0, window_clips=50), 10, 5)
    assert rows_of(ClipOrder(np.arange(50) % 7, seed=0, window_clips=50), 10, 5) == rows
    assert rows_of(ClipOrder(np.zeros(50), seed=1, window_clips=50), 10, 5) != rows


def test_a_large_table_is_read_window_by_window():
    groups = np.arange(120) // 10
    epoch = rows_of(ClipOrder(groups, seed=0, window_clips=40), num_steps=1, batch_size=120)
    assert sorted(epoch) == list(range(120))
    windows = [set(groups[epoch[start : start + 40]]) for start in (0, 40, 80)]
    assert [len(window) for window in windows] == [4, 4, 4]
    assert set.union(*windows) == set(range(12))
    assert epoch[:40] != sorted(epoch[:40])


def test_crops_are_seeded_and_reach_every_start():
    starts = [crop_start(0, step, 0, 3) for step in range(40)]
    assert set(starts) == {0, 1, 2}
    assert starts == [crop_start(0, step, 0, 3) for step in range(40)]
    assert crop_start(0, 0, 0, 1) == 0


@pytest.mark.parametrize(
    ("sizes", "batch_size"), [([10], 4), ([7, 5, 1], 4), ([1, 1], 64), ([40, 3], 1), ([1000, 17, 400], 8)]
)
def test_every_bucket_has_all_of_its_batches_in_turn_and_its_clips_their_share(sizes: list[int], batch_size: int):
    order = BucketOrder(sizes, batch_size, seed=0)
    num_epochs = 12
    num_steps = sum(-(-num_epochs * size // batch_size) for size in sizes)
    turns = [order.turn(step) for step in range(num_steps)]
    for bucket, size in enumerate(sizes):
        batches = [turn.batch for turn in turns if turn.bucket == bucket]
        assert batches == list(range(len(batches))), "none is skipped or repeated"
        assert num_epochs * size <= len(batches) * batch_size < num_epochs * size + batch_size


def test_the_turns_of_a_step_do_not_depend_on_the_steps_before():
    order = BucketOrder([7, 5, 1], 4, seed=0)
    turns = [order.turn(step) for step in range(30)]
    assert [BucketOrder([7, 5, 1], 4, seed=0).turn(step) for step in (29, 3, 17)] == [turns[29], turns[3], turns[17]]
    assert [BucketOrder([7, 5, 1], 4, seed=1).turn(step) for step in range(30)] != turns
    assert len({tuple(turn.bucket for turn in turns[start : start + 5]) for start in range(25)}) > 4, "no fixed cycle"


def test_a_table_of_one_bucket_has_its_batches_one_after_the_other():
    order = BucketOrder([10], 4, seed=0)
    assert [order.turn(step) for step in range(20)] == [Turn(0, step) for step in range(20)]
