"""The files of a run: what is in a checkpoint, when a folder may be used, the run card."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cache.disk_store import DiskStore
from cache.store import RowKey
from configs.load import parse_config, to_toml
from configs.schema import RunConfig
from episodes.build import head_config
from pipeline.ancestry import classes_of_run
from pipeline.checkpoint import CheckpointError, Newest, load_checkpoint, load_newest, save_checkpoint
from pipeline.console import say
from pipeline.model import ClipEncoder, describe_backbone
from pipeline.optimisation import Stepper
from pipeline.settings import SetupError
from pipeline.setup import Workplace
from pipeline.weights_files import weights_name

# May differ between a run and its resumption: they change no number of the training.
CHANGEABLE = frozenset(
    {
        "training.decode_workers",
        "training.batches_ahead",
        "training.check_videos",
        "training.loggers",
        "training.save_seconds",
        "training.clip_cache_bytes",
        "training.cube_cache_bytes",
        "training.initial_weights",
        "extraction.decode_workers",
        "extraction.seconds_per_video",
        "extraction.decode_memory_bytes",
        "evaluation.episodes",
        "evaluation.split",
        "backbone.weights",
        "store.path",
        "store.shard_rows",
        "data.manifest",
    }
)


ORIGINS = (("training", "initial_weights"), ("backbone", "weights"))
"""Where first weights come from: changeable only as the place of a file."""


@dataclass(slots=True)
class Progress:
    """What the loop has reached; goes into the checkpoint."""

    episode: int = 0
    """Training episodes done."""
    validated_episode: int = -1
    """At which of them the latest validation was; -1 before the first."""
    best_accuracy: float | None = None
    best_interval95: float | None = None
    """Of the validation split; None where held-out videos chose."""
    best_episode: int = 0
    """Of the best checkpoint, by the validation split."""
    test_selected_accuracy: float | None = None
    """Highest score of the test split; published protocol, never used for selection."""
    seconds: float = 0.0
    """Wall clock of all calls."""
    best_outcomes_digest: str | None = None
    """SHA-256 over which queries of the best checkpoint's validation were right."""
    best_episode_hash: str | None = None
    """Of the episodes of that validation."""
    resumptions: int = 0
    """How often the run was gone on with, while something was left to do."""
    started_from: dict[str, str] = field(default_factory=dict)
    """What its first weights came from, by setting (`pipeline.weights_files.started_from`)."""
    started_utc: str | None = None
    """When it began, ISO 8601."""
    degraded: dict[str, str] = field(default_factory=dict)
    """Reason by video id, of every video read in any call that was not quite whole."""
    second_tries: int = 0
    """Videos that were decoded anew after a fault that may pass, in all calls."""
    lost_decoding_processes: int = 0
    """That died or were late, in all calls."""
    store_content_hash: str | None = None
    """Of the store when training ended."""
    computed_on: list[dict[str, Any]] = field(default_factory=list)
    """What the bits depend on beside config and data, each with the episode from which on; more than one where it changed."""

    @classmethod
    def now(cls) -> Progress:
        """Of a run that begins."""
        return cls(started_utc=datetime.now(UTC).isoformat(timespec="seconds"))


def is_begun(folder: Path) -> bool:
    """Whether there is a run in a folder that could be gone on with."""
    has_any = (folder / "last.pt").is_file() or (folder / "previous.pt").is_file()
    return has_any and (folder / "config.toml").is_file()


def refuse_wrong_folder(folder: Path, resume: bool) -> None:
    """A folder is free unless a run in it has done a step; only such a run, or one about to begin, can be resumed.

    Raises:
        SetupError: the folder is taken, or there is nothing to resume.
    """
    if resume and not is_begun(folder):
        raise SetupError(f"{folder} holds no run to resume (no last.pt). Start it without --resume.")
    if not resume and is_begun(folder) and load_for_resume(folder).content["progress"]["episode"] > 0:
        raise SetupError(f"{folder} holds a run already. Go on with --resume, or choose another --out.")
    if not resume and (folder / "card.json").is_file():
        raise SetupError(f"{folder} holds a finished run already. Choose another --out.")


def refuse_other_config(config: RunConfig, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume with settings that would change the numbers.

    A run may be made longer or shorter where its steps are then those of a run that always had that length: its learning rate does
    not depend on it, and it stands at the end of a full step. (It was validated where it ended first, and may be best there.)

    Raises:
        SetupError: names every such field with both values, or options of the head whose defaults have changed since.
    """
    stored = parse_config(tomllib.loads(checkpoint["config"])).model_dump(mode="json")
    wanted = config.model_dump(mode="json")
    changeable = set(CHANGEABLE)
    done, training = int(checkpoint["progress"]["episode"]), config.training
    is_between_full_steps = (
        done + (1 if training.published_first_step and done else 0)
    ) % training.episodes_per_step == 0
    if training.schedule != "cosine" and training.episodes >= done and is_between_full_steps:
        changeable.add("training.episodes")
    if stored["head"] == wanted["head"] and checkpoint["head_options"] != resolved_head_options(config):
        raise SetupError(
            "--resume: the head's options that the config leaves out had other defaults when the run began: "
            f"{checkpoint['head_options']}, now {resolved_head_options(config)}. State them, or start a new --out."
        )
    other_origins = _other_origins(stored, wanted, checkpoint["progress"].get("started_from", {}))
    changeable -= other_origins
    differing = [
        f"{table}.{key}: run {stored[table].get(key)!r}, now {wanted[table].get(key)!r}"
        + (", which does not hold the bytes that it began with" if f"{table}.{key}" in other_origins else "")
        for table in stored
        for key in sorted({*stored[table], *wanted[table]})
        if stored[table].get(key) != wanted[table].get(key) and f"{table}.{key}" not in changeable
    ]
    if differing:
        raise SetupError(
            f"--resume with another config: {'; '.join(differing)}. Use the run's own settings, or start a new --out."
        )


def _other_origins(stored: Mapping[str, Any], wanted: Mapping[str, Any], started_from: Mapping[str, str]) -> set[str]:
    """Where the run's first weights came from, as far as it is not the same content in another place: that stays as it was."""
    found = set()
    for table, key in ORIGINS:
        before, now = stored[table].get(key), wanted[table].get(key)
        setting = f"{table}.{key}"
        if before == now:
            continue
        if before is None or now is None:
            found.add(setting)
            continue
        is_same_place = Path(now).resolve() == Path(before)  # of a file that may be gone
        if not is_same_place and weights_name(now) != started_from.get(setting):
            found.add(setting)
    return found


def with_first_origins(config: RunConfig, checkpoint: Mapping[str, Any]) -> RunConfig:
    """The config of a run that goes on, with the weights that it once began with where they have not been moved."""
    stored = parse_config(tomllib.loads(checkpoint["config"]))
    for table, key in ORIGINS:
        before, now = getattr(getattr(stored, table), key), getattr(getattr(config, table), key)
        if now is None or not Path(now).exists():
            config = config.model_copy(update={table: getattr(config, table).model_copy(update={key: before})})
    return config


def load_for_resume(folder: Path) -> Newest:
    """The newest good checkpoint of a run, on the CPU.

    Raises:
        CheckpointError: there is none, or none that can be read.
        SetupError: it is of a version whose runs cannot be gone on with.
    """
    found = load_newest([folder / "last.pt", folder / "previous.pt"])
    if "stepper" not in found.content:
        raise SetupError(
            f"{found.path} is of an earlier version, which kept another state. Train anew into another --out."
        )
    return found


def refuse_lost_best(folder: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a run whose best checkpoint is gone or damaged before hours go into it: without that it has no result.

    Raises:
        SetupError: it was validated, and there is no good best.pt.
    """
    path = folder / "best.pt"
    if checkpoint["progress"]["validated_episode"] < 0:
        return
    problem = f"{path} is gone."
    if path.is_file():
        try:
            load_checkpoint(path)
            return
        except CheckpointError as error:
            problem = str(error)
    raise SetupError(
        f"{problem} It has the best weights so far (after {checkpoint['progress']['best_episode']} episodes): restore it from a copy, or "
        f'begin another run with training.initial_weights="{folder / "last.pt"}" and a new --out.'
    )


def note_resumption(checkpoint: Newest) -> None:
    """Say from where a run goes on, and what is wrong with a checkpoint that was passed over, whose place it takes."""
    for problem in checkpoint.problems:
        say(f"warning: {problem}")
    say(f"going on from {checkpoint.path} after {checkpoint.content['progress']['episode']} episodes")
    last = checkpoint.path.with_name("last.pt")
    if checkpoint.path != last:
        # Else the next write would keep the damaged one in place of the only good one.
        checkpoint.path.replace(last)


def save_run(path: Path, place: Workplace, stepper: Stepper, progress: Progress, cubes_digest: str | None) -> None:
    """Write a checkpoint: weights, optimiser, position, generators, resolved config, and what the numbers depend on.

    best.pt has the weights that were validated (the moving average, where there is one) and nothing that only training needs;
    last.pt has everything, and leaves the one before it as previous.pt.
    """
    config, encoder = place.config, place.model.encoder
    is_best = path.name == "best.pt"
    content: dict[str, Any] = {
        "model": ((is_best and stepper.averaged_model()) or place.model).state_dict(),
        "progress": asdict(progress),
        "config": to_toml(config),
        "head_options": resolved_head_options(config),
        "backbone": describe_backbone(encoder.backbone) if isinstance(encoder, ClipEncoder) else None,
        "classes": {split: list(place.manifest.classes(split)) for split in ("train", "val", "test")},
        "inherited_classes": place.inherited.to_json(),
        "num_classes": place.num_classes,
        "split_hash": place.manifest.split_hash,
        "store_spec": place.store.spec.to_json() if place.store else None,
        "cubes_digest": cubes_digest,
        "dropped": dropped_of(place),
    }
    if is_best:
        save_checkpoint(path, content)
        return
    content |= {"stepper": stepper.state_dict(), "generators": generator_states()}
    save_checkpoint(path, content, keep=path.with_name("previous.pt"))


def dropped_of(place: Workplace) -> dict[str, float]:
    """What a learning backbone drops, where a directory of the user's decides that."""
    encoder = place.model.encoder
    is_learning = isinstance(encoder, ClipEncoder) and encoder.is_trained
    return dict(getattr(encoder.backbone, "dropped", {})) if is_learning else {}


def generator_states() -> dict[str, Any]:
    """The state of torch's global generators. Nothing of ours draws from them; a user's own head or backbone may.

    Of several ranks, those of the first.
    """
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_generators(states: Mapping[str, Any]) -> None:
    """Set torch's global generators to what `generator_states` gave; GPUs as far as there are any."""
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def resolved_head_options(config: RunConfig) -> dict[str, Any]:
    """Every option of the head with its value, so that a default that changes later cannot re-interpret a run."""
    return head_config(config.head.name, config.head.options).model_dump(mode="json")


def digest_cubes(place: Workplace) -> str | None:
    """SHA-256 over the cubes that a run on the cache reads; None where it has no store.

    A store may grow by other videos while a run is going on.
    """
    if not isinstance(place.store, DiskStore):
        return None if place.store is None else place.store.content_hash()
    training = place.config.training
    views = {"train": range(place.config.episodes.train_views), "val": range(1)}
    if training.track_test:
        views["test"] = range(1)
    digest = hashlib.sha256()
    for split, numbers in views.items():
        # In an order of their own: the rows of a manifest may change places, and no episode changes with them.
        for video in sorted(place.manifest.videos_of(split), key=lambda video: video.video_id):
            for view in numbers:
                hashes = place.store.row_hashes(RowKey(video.video_id, view))
                own = None if hashes is None else hashes.get(place.config.head.array)  # a rejected row has none
                digest.update(json.dumps([video.video_id, view, own]).encode())
    return digest.hexdigest()


def refuse_other_data(checkpoint: Mapping[str, Any], place: Workplace) -> None:
    """Refuse to resume on other data than the run began with, or with other noise.

    Raises:
        SetupError: another split hash, another store, or other cubes in it; a backbone that drops other shares.
    """
    spec = place.store.spec.to_json() if place.store else None
    dropped = dropped_of(place)
    if checkpoint.get("dropped", dropped) != dropped:
        raise SetupError(
            f"--resume: while it learns, the run's backbone drops {checkpoint['dropped']}, now {dropped}: that stands in the directory "
            f"that it began with, and {place.config.backbone.weights} is gone or other. Restore it, or start a new --out."
        )
    if checkpoint["split_hash"] != place.manifest.split_hash:
        raise SetupError(
            f"--resume: the run's split hash is {checkpoint['split_hash'][:12]}, now it is {place.manifest.split_hash[:12]}. "
            "Restore the manifest, or start a new --out."
        )
    if checkpoint["store_spec"] != spec:
        raise SetupError(
            "--resume: the store's spec is not the one that the run began with. Restore it, or start a new --out."
        )
    if checkpoint["cubes_digest"] != digest_cubes(place):
        raise SetupError(
            "--resume: cubes of the store are not those that the run began with, though they were made alike (were its videos "
            "exchanged and extracted anew?). Restore the store, or start a new --out."
        )


def set_card_aside(folder: Path, episode: int) -> None:
    """Keep the card of a finished run that goes on under another name: it says nothing about the run to come."""
    for ending in ("json", "md"):
        card = folder / f"card.{ending}"
        if card.exists():
            card.replace(folder / f"card_after_{episode}_episodes.{ending}")


def export_backbone(folder: Path) -> None:
    """Write the best checkpoint's backbone as a plain state dict, for `mastaf extract --weights` and for other tools."""
    prefix = "encoder.backbone."
    best = load_checkpoint(folder / "best.pt")
    state = {name.removeprefix(prefix): value for name, value in best["model"].items() if name.startswith(prefix)}
    seen = classes_of_run(best).to_json()
    save_checkpoint(folder / "backbone.pt", {"state_dict": state, "seen_classes": seen})
