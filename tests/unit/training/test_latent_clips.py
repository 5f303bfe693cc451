"""The clips of a step come out of real tables as they were put in, and unusable tables are refused with the numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from simda.data.schema import LATENTS, TEXT_EMBEDDINGS, TEXT_TOKENS, build_table, caption_id
from simda.data.store import OutputStore
from simda.data.tensors import tensor_columns
from simda.errors import ConfigError, InputError
from simda.training.latent_clips import LatentClips
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


def test_a_batch_has_the_latents_and_embeddings_of_its_clips(tmp_path: Path):
    clips = LatentClips(write_tables(tmp_path, [latents_row(number) for number in range(20)]), num_frames=6, seed=0)
    assert (clips.num_clips, clips.clip_shape) == (20, SHAPE)
    assert (clips.null_prompt_embeds() == -1).all()
    seen = []
    for step in range(5):
        batch = clips.batch(step, batch_size=4)
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
        LatentClips(store.uri, num_frames=4, seed=0, needs_low_res=True)
    for name in store.shard_names(LATENTS):
        store.delete_file(name)
    store.write_shard(LATENTS, build_table(LATENTS, rows, {"vae": "tiny", "low_res": {"scale": 4}}))
    clips = LatentClips(store.uri, num_frames=4, seed=0, needs_low_res=True)
    starts = set()
    for step in range(8):
        batch = clips.batch(step, batch_size=3)
        assert batch.low_res.shape == (3, 3, 4, 2, 3)
        levels = (batch.low_res[:, 0, :, 0, 0] + 1) * 127.5
        torch.testing.assert_close(levels, batch.latents[:, 0, :, 0, 0] * 16, rtol=0, atol=1e-3)
        starts |= {round(float(level)) % 16 for level in levels[:, 0]}
    assert starts == {0, 1, 2}
    assert LatentClips(store.uri, num_frames=4, seed=0).batch(0, 3).low_res is None


def test_the_spread_is_that_of_the_latents_and_only_of_tables_that_have_it(tmp_path: Path):
    rows = []
    for number in range(6):
        row = latents_row(number)
        latents = np.frombuffer(row["latents"], np.float16)
        rows.append(row | {"latents_std": (latents / 32).astype(np.float16).tobytes()})
    store = OutputStore(write_tables(tmp_path, rows))
    with pytest.raises(InputError, match="posterior's mean alone; cache it with keep_spread=true"):
        LatentClips(store.uri, num_frames=4, seed=0, needs_spread=True)
    for name in store.shard_names(LATENTS):
        store.delete_file(name)
    provenance = {"vae": "tiny", "preprocessing": {"keep_spread": True}}
    store.write_shard(LATENTS, build_table(LATENTS, rows, provenance))
    clips = LatentClips(store.uri, num_frames=4, seed=0, num_held_out=1, needs_spread=True)
    for step in range(4):
        batch = clips.batch(step, batch_size=2)
        torch.testing.assert_close(batch.latents_std, batch.latents / 32, rtol=1e-3, atol=0)
    held_out = clips.held_out()
    assert held_out is not None
    assert held_out.latents_std is None, "a validation loss is of the mean, always the same"


def test_ranks_share_a_batch(tmp_path: Path):
    clips = LatentClips(write_tables(tmp_path, [latents_row(number) for number in range(9)]), num_frames=3, seed=0)
    whole, halves = clips.batch(5, 4), [clips.batch(5, 4, rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half.latents for half in halves]), whole.latents)
    assert torch.equal(torch.cat([half.prompt_embeds for half in halves]), whole.prompt_embeds)
    assert [place for half in halves for place in half.places] == list(whole.places)


def test_training_does_not_depend_on_how_the_table_is_cut_nor_on_double_rows(tmp_path: Path):
    rows = [latents_row(number) for number in range(10)]
    one = LatentClips(write_tables(tmp_path / "a", rows, rows_per_shard=10), num_frames=6, seed=4)
    many = LatentClips(write_tables(tmp_path / "b", rows[::-1] + rows[3:5], rows_per_shard=3), num_frames=6, seed=4)
    assert one.identity() == many.identity()
    for step in range(4):
        assert torch.equal(one.batch(step, 3).latents, many.batch(step, 3).latents)


def test_longer_clips_give_seeded_spans(tmp_path: Path):
    clips = LatentClips(write_tables(tmp_path, [latents_row(0, (4, 6, 2, 3)), latents_row(1, (4, 9, 2, 3))]), 4, seed=0)
    spans = [clips.batch(step, 2).latents for step in range(30)]
    assert all(span.shape == (2, 4, 4, 2, 3) for span in spans)
    steps = torch.cat([span[:, 0, 1:, 0, 0] - span[:, 0, :-1, 0, 0] for span in spans])
    assert (steps == 1 / 16).all()
    starts = {float(span[place, 0, 0, 0, 0]) for span in spans for place in (0, 1)}
    assert starts == {0, 1 / 16, 2 / 16, *(1 + start / 16 for start in range(6))}


def test_bfloat16_latents_are_read_exactly(tmp_path: Path):
    bits = np.full(SHAPE, np.float32(1.5).view(np.uint32) >> 16, dtype=np.uint16)
    rows = [latents_row(0, **tensor_columns("latents", bits, dtype="bfloat16"))]
    batch = LatentClips(write_tables(tmp_path, rows), num_frames=6, seed=0).batch(0, 1)
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
        "several shapes.*2 of 4x6x2x3, 1 of 4x6x3x2": [*good[:2], latents_row(3, (4, 6, 3, 2))],
        "num_frames=6, but 1 of 4 clips .* shortest has 5 frames": [*good, latents_row(3, (4, 5, 2, 3))],
        "1 of 4 clips .* caption without text embedding, such as 'unknown'": [*good, latents_row(3, caption="unknown")],
    }
    for number, (message, rows) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            LatentClips(write_tables(tmp_path / str(number), rows), num_frames=6, seed=0)


def test_a_table_with_token_ids_alone_is_refused(tmp_path: Path):
    store = OutputStore(str(tmp_path))
    store.write_shard(LATENTS, build_table(LATENTS, [latents_row(0)], {}))
    ids = {"caption_id": caption_id(""), "caption": "", **tensor_columns("token_ids", np.zeros(3, np.int32))}
    store.write_shard(TEXT_TOKENS, build_table(TEXT_TOKENS, [ids], {}))
    store.write_manifest({})
    with pytest.raises(InputError, match="holds token ids in place of text embeddings"):
        LatentClips(store.uri, 6, seed=0)


def test_missing_unfinished_and_empty_outputs_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist; give the output directory of cache_latents"):
        LatentClips(str(tmp_path / "none"), 6, seed=0)
    uri = write_tables(tmp_path / "unfinished", [latents_row(0)])
    OutputStore(uri).invalidate_manifest()
    with pytest.raises(InputError, match="not complete"):
        LatentClips(uri, 6, seed=0)
    store = OutputStore(str(tmp_path / "empty"))
    store.write_shard(LATENTS, build_table(LATENTS, [], {}))
    store.write_shard(TEXT_EMBEDDINGS, build_table(TEXT_EMBEDDINGS, EMBEDDINGS, {}))
    store.write_manifest({})
    with pytest.raises(InputError, match=r"the latents table in .* has no rows"):
        LatentClips(store.uri, 6, seed=0)


def test_no_null_prompt_no_training(tmp_path: Path):
    with pytest.raises(InputError, match="lack the null prompt"):
        LatentClips(write_tables(tmp_path, [latents_row(0)], embeddings=EMBEDDINGS[:3]), 6, seed=0)


def test_a_table_that_vanishes_during_training_is_named(tmp_path: Path):
    clips = LatentClips(write_tables(tmp_path, [latents_row(number) for number in range(20)]), num_frames=6, seed=0)
    for file in (tmp_path / "data").glob("*.parquet"):
        file.unlink()
    with pytest.raises(InputError, match=r"\.parquet can no longer be read: .*bring it back"):
        clips.batch(0, 4)


def test_a_batch_names_its_clips(tmp_path: Path):
    clips = LatentClips(write_tables(tmp_path, [latents_row(number) for number in range(20)]), num_frames=6, seed=0)
    batch = clips.batch(3, 4)
    assert [int(name.removeprefix("clip-")) for name in batch.clip_ids] == batch.latents[:, 0, 0, 0, 0].int().tolist()


def test_whole_videos_are_held_out_and_every_rank_has_its_share_of_them(tmp_path: Path):
    rows = [latents_row(number, video_uri=f"{number // 3}.mp4") for number in range(21)]
    uri = write_tables(tmp_path, rows)
    clips = LatentClips(uri, num_frames=6, seed=0, num_held_out=4)
    assert (clips.num_clips, clips.num_held_out) == (15, 6)
    shares = [clips.held_out(rank, 4) for rank in range(4)]
    held_out = {name: place for share in shares for name, place in zip(share.clip_ids, share.places, strict=True)}
    assert sorted(held_out.values()) == list(range(6))
    videos = {int(name.removeprefix("clip-")) // 3 for name in held_out}
    assert len(videos) == 2
    trained = {name for step in range(15) for name in clips.batch(step, 4).clip_ids}
    assert len(trained) == 15
    assert not trained & set(held_out)
    other_seed = LatentClips(uri, num_frames=4, seed=9, num_held_out=4)
    assert other_seed.held_out().clip_ids == clips.held_out().clip_ids
    assert torch.equal(other_seed.held_out().latents, other_seed.held_out().latents)
    assert LatentClips(uri, num_frames=6, seed=0).held_out() is None


def test_holding_out_everything_is_refused(tmp_path: Path):
    uri = write_tables(tmp_path, [latents_row(number, video_uri="one.mp4") for number in range(5)])
    with pytest.raises(ConfigError, match=r"num_validation_clips=1 leaves nothing to train on: .* has 5 clips"):
        LatentClips(uri, num_frames=6, seed=0, num_held_out=1)
