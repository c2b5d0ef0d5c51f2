"""Labelled clips for classification: each once per epoch, any of them at any time, the held-out ones never."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from episodes.clip_sampler import ClipSampler
from episodes.datasets import Manifest
from episodes.sampler import SamplerError
from episodes.video import Video

SIZES = {"jump": 7, "run": 10, "walk": 3}


def manifest(sizes: dict[str, int] = SIZES, *, backwards: bool = False) -> Manifest:
    videos = [
        Video(f"{name}/{number}", f"{name}/{number}.mp4", name, "train")
        for name, count in sizes.items()
        for number in range(count)
    ]
    videos.append(Video("swim/0", "swim/0.mp4", "swim", "test"))
    return Manifest(tuple(videos[::-1] if backwards else videos), Path("/videos"))


def ids(sampler: ClipSampler, indices: range) -> list[str]:
    return [sampler.episode(index).query_ids[0] for index in indices]


def test_clip_is_an_episode_of_one_query_with_its_global_label() -> None:
    sampler = ClipSampler(manifest(), seed=3)
    assert sampler.class_names == ("jump", "run", "walk")
    for index in range(40):
        episode = sampler.episode(index)
        assert episode.index == index
        assert episode.support_ids == () == episode.support_labels
        (video_id,), (label,) = episode.query_ids, episode.query_labels
        assert episode.class_names[label] == video_id.split("/")[0]


def test_every_epoch_shows_every_video_once_in_another_order() -> None:
    sampler = ClipSampler(manifest(), seed=1)
    count = len(sampler.video_ids)
    assert count == 20
    epochs = [ids(sampler, range(count * epoch, count * (epoch + 1))) for epoch in range(4)]
    assert all(sorted(epoch) == sorted(sampler.video_ids) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_clip_depends_on_seed_and_index_alone() -> None:
    sampler = ClipSampler(manifest(), 0.2, seed=5)
    inorder = ids(sampler, range(100))
    # Backwards, twice and from several threads: what was asked before does not matter.
    again = ClipSampler(manifest(backwards=True), 0.2, seed=5)
    assert ids(again, range(99, -1, -1)) == inorder[::-1]
    assert [ids(again, range(index, index + 1))[0] for index in range(100)] == inorder
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda index: again.episode(index).query_ids[0], range(100))) == inorder
    assert ids(ClipSampler(manifest(), 0.2, seed=6), range(100)) != inorder


def test_clips_of_another_version_of_this_library_are_the_same() -> None:
    """A golden order: a run that is resumed elsewhere, or years later, goes on with the same clips."""
    sampler = ClipSampler(manifest(), 0.3, seed=0)
    assert sampler.held_out_ids == ("jump/1", "jump/2", "run/3", "run/8", "run/9", "walk/2")
    assert ids(sampler, range(8)) == ["run/6", "run/5", "run/0", "walk/0", "run/4", "run/7", "jump/0", "jump/5"]


def test_held_out_videos_are_never_trained_on_and_every_class_has_some() -> None:
    sampler = ClipSampler(manifest(), 0.3)
    # 2.1, 3 and 0.9 videos.
    assert Counter(name.split("/")[0] for name in sampler.held_out_ids) == {"jump": 2, "run": 3, "walk": 1}
    assert [sampler.class_names[label] for label in sampler.held_out_labels] == [
        name.split("/")[0] for name in sampler.held_out_ids
    ]
    assert not set(sampler.held_out_ids) & set(ids(sampler, range(100)))
    assert sorted(sampler.held_out_ids + sampler.video_ids) == sorted(ClipSampler(manifest()).video_ids)


@pytest.mark.parametrize(
    ("holdout", "counts"), [(0.0, (0, 0, 0)), (0.01, (1, 1, 1)), (0.25, (2, 3, 1)), (0.99, (6, 9, 2))]
)
def test_a_class_keeps_a_video_to_learn_from_and_one_to_score(holdout: float, counts: tuple[int, ...]) -> None:
    found = Counter(ClipSampler(manifest(), holdout).held_out_labels)
    assert tuple(found[label] for label in range(3)) == counts


def test_held_out_videos_are_those_of_every_seed_and_among_those_of_a_larger_share() -> None:
    first, second = ClipSampler(manifest(), 0.2, seed=0), ClipSampler(manifest(), 0.2, seed=9)
    assert first.held_out_ids == second.held_out_ids
    assert set(first.held_out_ids) < set(ClipSampler(manifest(), 0.6).held_out_ids)


def test_class_with_one_video_is_refused_by_name_where_one_must_be_held_out() -> None:
    with pytest.raises(SamplerError, match=r"1 classes have only one: walk.*classify\.holdout = 0"):
        ClipSampler(manifest({"run": 4, "walk": 1}), 0.1)
    assert len(ClipSampler(manifest({"run": 4, "walk": 1})).video_ids) == 5


def test_manifest_without_training_classes_is_refused() -> None:
    with pytest.raises(SamplerError, match="no class to learn"):
        ClipSampler(manifest({}))


@pytest.mark.parametrize("holdout", [-0.1, 1.0])
def test_share_that_is_none_is_refused(holdout: float) -> None:
    with pytest.raises(ValueError, match="not a share"):
        ClipSampler(manifest(), holdout)
