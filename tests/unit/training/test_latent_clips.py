"""The clips of a step come out of real tables as they were put in, and unusable tables are refused with the numbers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from simda.data.schema import LATENTS, TEXT_EMBEDDINGS, TEXT_TOKENS, build_table, caption_id
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.errors import ConfigError, InputError, ModelMismatchError
from simda.training.latent_clips import LatentClips, open_with_images
from simda.training.tensor_table import TensorTable

SHAPE = (4, 6, 2, 3)


def latents_row(number: int, shape: tuple[int, ...] = SHAPE, **changes) -> dict:
    """Frame t of clip n is filled with n + t / 16, which float16 holds exactly."""
    frames = number + np.arange(shape[1], dtype=np.float16) / 16
    latents = np.broadcast_to(frames[None, :, None, None], shape)
    return {
        "clip_id": f"clip-{number:03}",
        "video_uri": f"{number}.mp4",
        "start_s": 0.0,
        "end_s": 1.0,
        "fps": 8.0,
        "num_frames": shape[1],
        "height_px": 16,
        "width_px": 24,
        "caption": f"caption {number % 3}",
        "decoder": "decord",
        **tensor_columns("latents", latents),
        **changes,
    }


def embedding_row(caption: str, value: float) -> dict:
    embeds = np.full((2, 5), value, dtype=np.float16)
    return {"caption_id": caption_id(caption), "caption": caption, **tensor_columns("prompt_embeds", embeds)}


EMBEDDINGS = [embedding_row(f"caption {number}", number) for number in range(3)] + [embedding_row("", -1)]


def write_tables(folder: Path, rows: list[dict], embeddings: list[dict] = EMBEDDINGS, rows_per_shard: int = 7) -> str:
    store = OutputStore(str(folder))
    for start in range(0, len(rows), rows_per_shard):
        store.write_shard(LATENTS, build_table(LATENTS, rows[start : start + rows_per_shard], {"vae": "tiny"}))
    store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, embeddings, {"text_encoder": "tiny"}))
    store.write_manifest({})
    return str(folder)


def open_clips(uri: str, *, num_frames: int = 6, seed: int = 0, batch_size: int = 2, **changes) -> LatentClips:
    return LatentClips(uri, num_frames, seed=seed, batch_size=batch_size, **changes)


open_table = partial(LatentClips, seed=0, batch_size=2)


def test_a_batch_has_the_latents_and_embeddings_of_its_clips(tmp_path: Path):
    clips = open_clips(write_tables(tmp_path, [latents_row(number) for number in range(20)]), batch_size=4)
    assert (clips.num_clips, clips.buckets) == (20, {SHAPE: 20})
    assert (clips.null_prompt_embeds() == -1).all()
    seen = []
    for step in range(5):
        batch = clips.batch(step)
        assert batch.latents.shape == (4, *SHAPE)
        numbers = batch.latents[:, 0, 0, 0, 0]
        frames = numbers[:, None] + torch.arange(6) / 16
        assert torch.equal(batch.latents, frames[:, None, :, None, None].expand(4, *SHAPE))
        assert torch.equal(batch.prompt_embeds, (numbers % 3)[:, None, None].expand(4, 2, 5))
        assert list(batch.places) == [0, 1, 2, 3]
        seen += numbers.tolist()
    assert sorted(seen) == list(range(20))


def test_low_resolution_frames_are_those_of_the_latents(tmp_path: Path):
    """The same clips, and of longer ones the same spans."""
    rows = []
    for number in range(6):
        frames = np.full((6, 2, 3, 3), 16 * number, dtype=np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None]
        rows.append(latents_row(number, **tensor_columns("low_res", frames)))
    store = OutputStore(write_tables(tmp_path, rows))
    with pytest.raises(InputError, match="no low-resolution frames; cache them with an upscaler"):
        open_clips(store.uri, num_frames=4, batch_size=3, needs_low_res=True)
    for name in store.shard_names(LATENTS):
        store.delete_file(name)
    store.write_shard(LATENTS, build_table(LATENTS, rows, {"vae": "tiny", "low_res": {"scale": 4}}))
    clips = open_clips(store.uri, num_frames=4, batch_size=3, needs_low_res=True)
    starts = set()
    for step in range(8):
        batch = clips.batch(step)
        assert batch.low_res.shape == (3, 3, 4, 2, 3)
        levels = (batch.low_res[:, 0, :, 0, 0] + 1) * 127.5
        torch.testing.assert_close(levels, batch.latents[:, 0, :, 0, 0] * 16, rtol=0, atol=1e-3)
        starts |= {round(float(level)) % 16 for level in levels[:, 0]}
    assert starts == {0, 1, 2}
    assert open_clips(store.uri, num_frames=4).batch(0).low_res is None


def test_the_spread_is_that_of_the_latents_and_only_of_tables_that_have_it(tmp_path: Path):
    rows = []
    for number in range(6):
        row = latents_row(number)
        latents = np.frombuffer(row["latents"], np.float16)
        rows.append(row | {"latents_std": (latents / 32).astype(np.float16).tobytes()})
    store = OutputStore(write_tables(tmp_path, rows))
    with pytest.raises(InputError, match="posterior's mean alone; cache it with keep_spread=true"):
        open_clips(store.uri, num_frames=4, needs_spread=True)
    for name in store.shard_names(LATENTS):
        store.delete_file(name)
    provenance = {"vae": "tiny", "preprocessing": {"keep_spread": True}}
    store.write_shard(LATENTS, build_table(LATENTS, rows, provenance))
    clips = open_clips(store.uri, num_frames=4, num_held_out=1, needs_spread=True)
    for step in range(4):
        batch = clips.batch(step)
        torch.testing.assert_close(batch.latents_std, batch.latents / 32, rtol=1e-3, atol=0)
    (held_out,) = clips.held_out()
    assert held_out.latents_std is None, "a validation loss is of the mean, always the same"


def test_ranks_share_a_batch(tmp_path: Path):
    uri = write_tables(tmp_path, [latents_row(number) for number in range(9)])
    clips = open_clips(uri, num_frames=3, batch_size=4)
    whole, halves = clips.batch(5), [clips.batch(5, rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.latents for half in halves]), whole.latents)
    assert torch.equal(torch.cat([half.prompt_embeds for half in halves]), whole.prompt_embeds)
    assert [place for half in halves for place in half.places] == list(whole.places)


def test_training_does_not_depend_on_how_the_table_is_cut_nor_on_double_rows(tmp_path: Path):
    rows = [latents_row(number) for number in range(10)]
    one = open_clips(write_tables(tmp_path / "a", rows, rows_per_shard=10), seed=4, batch_size=3)
    many = open_clips(write_tables(tmp_path / "b", rows[::-1] + rows[3:5], rows_per_shard=3), seed=4, batch_size=3)
    assert one.identity() == many.identity()
    for step in range(4):
        assert torch.equal(one.batch(step).latents, many.batch(step).latents)


def test_longer_clips_give_seeded_spans(tmp_path: Path):
    uri = write_tables(tmp_path, [latents_row(0, (4, 6, 2, 3)), latents_row(1, (4, 9, 2, 3))])
    clips = open_clips(uri, num_frames=4)
    spans = [clips.batch(step).latents for step in range(30)]
    assert all(span.shape == (2, 4, 4, 2, 3) for span in spans)
    steps = torch.cat([span[:, 0, 1:, 0, 0] - span[:, 0, :-1, 0, 0] for span in spans])
    assert (steps == 1 / 16).all()
    starts = {float(span[place, 0, 0, 0, 0]) for span in spans for place in (0, 1)}
    assert starts == {0, 1 / 16, 2 / 16, *(1 + start / 16 for start in range(6))}


def test_bfloat16_latents_are_read_exactly(tmp_path: Path):
    bits = np.full(SHAPE, np.float32(1.5).view(np.uint32) >> 16, dtype=np.uint16)
    rows = [latents_row(0, **tensor_columns("latents", bits, dtype="bfloat16"))]
    batch = open_clips(write_tables(tmp_path, rows)).batch(0)
    assert (batch.latents == 1.5).all()


def test_row_groups_beyond_the_memory_limit_are_forgotten(tmp_path: Path):
    rows = [latents_row(number) for number in range(64)]
    store = OutputStore(write_tables(tmp_path, rows, rows_per_shard=64))
    group_bytes = 32 * (4 * 6 * 2 * 3 * 2)
    table = TensorTable(store, LATENTS, "latents", ("clip_id",), cache_bytes=int(1.5 * group_bytes))
    assert table.groups.tolist() == [0] * 32 + [1] * 32
    for row in (0, 40, 63, 5):
        assert table.tensor(row)[0, 0, 0, 0] == row
        assert len(table._cache) == 1


def test_a_table_is_refused_with_what_is_wrong(tmp_path: Path):
    good = [latents_row(number) for number in range(3)]
    cases = {
        "num_frames=6, but all 2 clips .* longest has 5 frames": [latents_row(n, (4, 4 + n, 2, 3)) for n in (0, 1)],
        "1 of 4 clips .* caption without text embedding, such as 'unknown'": [*good, latents_row(3, caption="unknown")],
    }
    for number, (message, rows) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            open_clips(write_tables(tmp_path / str(number), rows))


def test_a_table_with_token_ids_alone_is_refused(tmp_path: Path):
    store = OutputStore(str(tmp_path))
    store.write_shard(LATENTS, build_table(LATENTS, [latents_row(0)], {}))
    ids = {"caption_id": caption_id(""), "caption": "", **tensor_columns("token_ids", np.zeros(3, np.int32))}
    store.write_shard(TEXT_TOKENS, build_table(TEXT_TOKENS, [ids], {}))
    store.write_manifest({})
    with pytest.raises(InputError, match="holds token ids in place of text embeddings"):
        open_clips(store.uri)


def test_missing_unfinished_and_empty_outputs_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist; give the output directory of cache_latents"):
        open_clips(str(tmp_path / "none"))
    uri = write_tables(tmp_path / "unfinished", [latents_row(0)])
    OutputStore(uri).invalidate_manifest()
    with pytest.raises(InputError, match="not complete"):
        open_clips(uri)
    store = OutputStore(str(tmp_path / "empty"))
    store.write_shard(LATENTS, build_table(LATENTS, [], {}))
    store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, EMBEDDINGS, {}))
    store.write_manifest({})
    with pytest.raises(InputError, match=r"the latents table in .* has no rows"):
        open_clips(store.uri)


def test_no_null_prompt_no_training(tmp_path: Path):
    with pytest.raises(InputError, match="lack the null prompt"):
        open_clips(write_tables(tmp_path, [latents_row(0)], embeddings=EMBEDDINGS[:3]))


def test_a_table_that_vanishes_during_training_is_named(tmp_path: Path):
    clips = open_clips(write_tables(tmp_path, [latents_row(number) for number in range(20)]), batch_size=4)
    for file in (tmp_path / "data").glob("*.parquet"):
        file.unlink()
    with pytest.raises(InputError, match=r"\.parquet can no longer be read: .*bring it back"):
        clips.batch(0)


def test_a_batch_names_its_clips(tmp_path: Path):
    clips = open_clips(write_tables(tmp_path, [latents_row(number) for number in range(20)]), batch_size=4)
    batch = clips.batch(3)
    assert [int(name.removeprefix("clip-")) for name in batch.clip_ids] == batch.latents[:, 0, 0, 0, 0].int().tolist()


def test_whole_videos_are_held_out_and_every_rank_has_its_share_of_them(tmp_path: Path):
    rows = [latents_row(number, video_uri=f"{number // 3}.mp4") for number in range(21)]
    uri = write_tables(tmp_path, rows)
    clips = open_clips(uri, batch_size=4, num_held_out=4)
    assert (clips.num_clips, clips.num_held_out) == (15, 6)
    shares = [share for rank in range(4) for share in clips.held_out(rank, 4)]
    held_out = {name: place for share in shares for name, place in zip(share.clip_ids, share.places, strict=True)}
    assert sorted(held_out.values()) == list(range(6))
    videos = {int(name.removeprefix("clip-")) // 3 for name in held_out}
    assert len(videos) == 2
    trained = {name for step in range(15) for name in clips.batch(step).clip_ids}
    assert len(trained) == 15
    assert not trained & set(held_out)
    other_seed = open_clips(uri, num_frames=4, seed=9, num_held_out=4)
    assert other_seed.held_out()[0].clip_ids == clips.held_out()[0].clip_ids
    assert torch.equal(other_seed.held_out()[0].latents, other_seed.held_out()[0].latents)
    assert open_clips(uri).held_out() == []


def test_holding_out_everything_is_refused(tmp_path: Path):
    uri = write_tables(tmp_path, [latents_row(number, video_uri="one.mp4") for number in range(5)])
    with pytest.raises(ConfigError, match=r"num_validation_clips=1 leaves nothing to train on: .* has 5 clips"):
        open_clips(uri, num_held_out=1)


def bucketed_rows() -> list[dict]:
    """Nine wide clips, five high ones and four short ones."""
    shapes = [(4, 6, 2, 3)] * 9 + [(4, 6, 3, 2)] * 5 + [(4, 1, 2, 3)] * 4
    return [latents_row(number, shape) for number, shape in enumerate(shapes)]


def test_buckets_never_mix_and_all_clips_are_seen_equally_often(tmp_path: Path):
    clips = open_clips(write_tables(tmp_path, bucketed_rows()), num_frames=4, batch_size=4)
    assert clips.buckets == {(4, 1, 2, 3): 4, (4, 4, 2, 3): 9, (4, 4, 3, 2): 5}
    assert clips.clip_shape == (4, 4, 2, 3)
    seen: dict[str, int] = {}
    for step in range(90):
        whole, halves = clips.batch(step), [clips.batch(step, rank, world_size=2) for rank in (0, 1)]
        assert whole.latents.shape[1:] in clips.buckets
        assert torch.equal(torch.cat([half.latents for half in halves]), whole.latents)
        for name, latents in zip(whole.clip_ids, whole.latents, strict=True):
            assert int(latents[0, 0, 0, 0]) == int(name.removeprefix("clip-"))
            seen[name] = seen.get(name, 0) + 1
    assert len(seen) == 18
    assert max(seen.values()) - min(seen.values()) <= 1 + 90 * 4 % 18


def test_held_out_clips_of_several_buckets_keep_their_places_on_every_number_of_ranks(tmp_path: Path):
    clips = open_clips(write_tables(tmp_path, bucketed_rows()), num_frames=4, num_held_out=9)
    whole, shares = clips.held_out(), [batch for rank in range(3) for batch in clips.held_out(rank, 3)]
    assert len(whole) > 1
    places = [
        {name: place for batch in batches for name, place in zip(batch.clip_ids, batch.places, strict=True)}
        for batches in (whole, shares)
    ]
    assert places[0] == places[1]
    assert sorted(places[0].values()) == list(range(9))


def test_the_order_and_what_is_held_out_are_the_same_wherever_the_videos_lie(tmp_path: Path):
    """Ids are not: they hold the whole path."""
    orders = []
    for folder, ids in (("/a/videos", range(40)), ("s3://bucket/elsewhere", range(39, -1, -1))):
        rows = [
            latents_row(number, clip_id=f"{id:03}", video_uri=f"{folder}/{number // 4:02}.mp4", start_s=number % 4 / 2)
            for number, id in enumerate(ids)
        ]
        clips = open_clips(write_tables(tmp_path / folder.rpartition("/")[2], rows), num_held_out=6)
        batches = [*clips.held_out(), *(clips.batch(step) for step in range(30))]
        orders.append([batch.latents[:, 0, 0, 0, 0].tolist() for batch in batches])
    assert orders[0] == orders[1]


def test_images_take_their_share_of_the_steps_and_leave_the_clips_order(tmp_path: Path):
    rows = [latents_row(number) for number in range(10)]
    uri = write_tables(tmp_path / "clips", rows)
    images = write_tables(tmp_path / "images", [latents_row(100 + number, (4, 3, 5, 5)) for number in range(6)])
    mixed, alone = (open_with_images(open_table, uri, 6, 2, table, 0.25) for table in (images, None))
    assert (mixed.num_clips, mixed.image_buckets) == (8, {(4, 1, 5, 5): 6})
    batches = [mixed.batch(step) for step in range(40)]
    shapes = [tuple(batch.latents.shape[1:]) for batch in batches]
    assert [shape == (4, 1, 5, 5) for shape in shapes] == [step % 4 == 3 for step in range(40)]
    of_clips = [batch for batch, shape in zip(batches, shapes, strict=True) if shape == SHAPE]
    assert all(torch.equal(batch.latents, alone.batch(step).latents) for step, batch in enumerate(of_clips))
    frames = {float(image[0, 0, 0, 0]) for batch in batches[3::4] for image in batch.latents}
    assert len(frames) > 6, "of each clip, one frame or another"
    assert {int(frame) for frame in frames} == set(range(100, 106))
    assert mixed.identity() != alone.identity()


def test_images_of_the_same_table_are_none_of_the_videos_that_are_held_out(tmp_path: Path):
    uri = write_tables(tmp_path, [latents_row(number) for number in range(10)])
    clips = open_with_images(open_table, uri, 6, 3, uri + "/", 0.5)
    held_out = set(clips.held_out()[0].clip_ids)
    seen = {name for step in range(60) for name in clips.batch(step).clip_ids}
    assert (len(held_out), len(seen), held_out & seen) == (3, 7, set())


def test_images_of_another_autoencoder_are_refused(tmp_path: Path):
    uri = write_tables(tmp_path / "clips", [latents_row(0)])
    store = OutputStore(str(tmp_path / "images"))
    store.write_shard(LATENTS, build_table(LATENTS, [latents_row(0)], {"vae": "another"}))
    store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, EMBEDDINGS, {"text_encoder": "tiny"}))
    store.write_manifest({})
    with pytest.raises(ModelMismatchError, match=r"images.latents=(.|\n)*vae: \"another\" -> \"tiny\""):
        open_with_images(open_table, uri, 6, 0, store.uri, 0.5)
