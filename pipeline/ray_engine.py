"""`mastaf extract --engine ray`: Ray Data spreads the shards over a cluster; what is done is decided by the ledger, as everywhere.

One item is one shard, and there are two stages (`ray_stages`): CPU tasks decode, actors that hold the backbone embed and commit.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache.disk_store import DiskStore
from cache.open import open_disk_store, store_kind
from cache.store import Shard
from configs.schema import RunConfig
from extract.decode import VideoSource
from pipeline.extraction import build_spec, plan_videos
from pipeline.extraction_report import ExtractionReport
from pipeline.interrupts import Stopped, StopRequest
from pipeline.job import Job, note_start, report_job
from pipeline.launch import LaunchError, num_cores
from pipeline.ray_session import RaySession
from pipeline.ray_stages import ActorSettings, ShardActor, ShardDecoder, ShardItem

POLL_SECONDS = 0.5
DEFAULT_TIMEOUT = 600.0
"""Seconds without a commit after which the run is taken for stuck; more where a shard holds many rows."""
TIMEOUT_PER_ROW = 10.0
"""Of the largest shard, in seconds."""
MAX_SHARD_BYTES = 1 << 31
"""Of decoded clips: what passes between the stages is one block."""

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""Environment variables that Ray reads when it starts: no reports over the network, no words on stderr but ours, and no second Ray
made by a thread that still asks for results when the first is ended."""


class RayFailed(RuntimeError):
    """Ray ended by itself or made no progress; what was committed stays."""

    exit_code = 2


def extract_with_ray(
    job: Job,
    videos: Sequence[VideoSource],
    backbone: nn.Module,
    config: RunConfig,
    origin: dict[str, Any] | None = None,
    retry: bool = False,
    timeout: float | None = None,
    wants_gpu: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExtractionReport:
    """Fill a store by the Ray cluster of RAY_ADDRESS, or by one that is made on this machine and ends with the call.

    Args:
        job: what to do.
        videos: of the job; their paths must lead to the files on every node, and so must the store's.
        backbone: on the CPU; it is sent to the actors.
        origin: kept in a store that is made, see `make_origin`.
        retry: make the rejected rows of these videos anew.
        timeout: seconds without a commit after which the run is stopped; None: 600, or more for large shards.
        wants_gpu: use the cluster's GPUs, if it has any.
        on_progress: called with (rows committed, rows planned), of the whole store.

    Raises:
        LaunchError: Ray is not installed, or the cluster or the shards do not suit.
        RayFailed: nothing was committed for `timeout` seconds, or Ray itself broke.
        Stopped: a signal came.
    """
    start = note_start(job, retry)
    spec = build_spec(config, backbone.eval(), torch.device("cpu"))
    kind = store_kind(job.store, job.store_kind)
    with open_disk_store(
        job.store, kind, spec, "a", config.store.shard_rows, config.store.compression, origin
    ) as store:
        plan_videos(store, videos, job.views, retry)
        items = _items(store, job.pending(store), videos, config)
    if timeout is None:
        most_rows = max((len(item.shard.rows) for item in items), default=0)
        timeout = max(DEFAULT_TIMEOUT, TIMEOUT_PER_ROW * most_rows)
    results: list[Mapping[str, Any]] = []
    if items:
        with StopRequest() as stop, _ray(config, job, stop) as ray:
            dataset = _dataset(ray, items, job.store, kind, backbone, config, wants_gpu)
            _consume(dataset, job, timeout, results, on_progress, stop)
    return report_job(job, start, results)


def _items(
    store: DiskStore, shards: Sequence[Shard], videos: Sequence[VideoSource], config: RunConfig
) -> list[ShardItem]:
    by_id = {video.video_id: video for video in videos}
    sampling = config.sampling
    items = []
    for shard in shards:
        num_bytes = len(shard.rows) * sampling.num_frames * sampling.crop_size**2 * 3
        if num_bytes > MAX_SHARD_BYTES:
            raise LaunchError(
                f"the clips of a shard take {num_bytes:,} bytes decoded, more than Ray passes on as one block "
                f"({MAX_SHARD_BYTES:,}). Make the store with a smaller store.shard_rows, or use --workers."
            )
        wanted = tuple(store.wanted(shard))
        names = {row.video_id for row, is_wanted in zip(shard.rows, wanted, strict=True) if is_wanted}
        of_shard = {name: by_id[name] for name in names}
        items.append(ShardItem(shard, wanted, of_shard, sampling, config.extraction))
    return items


@contextmanager
def _ray(config: RunConfig, job: Job, stop: StopRequest) -> Iterator[Any]:
    """Ray, connected and quiet; ended on the way out.

    Raises:
        LaunchError: it is not installed.
        Stopped: a signal came while it started.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise LaunchError(
            "--engine ray needs Ray: pip install -e '.[ray]' in the folder of mastaf, or use --workers"
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    is_own = not os.environ.get("RAY_ADDRESS")
    session = RaySession(
        ray,
        address="local" if is_own else None,
        # The actors take one; there must be another to decode.
        num_cpus=max(2, num_cores()) if is_own else None,
        include_dashboard=False if is_own else None,
        object_store_memory=_object_store_bytes(config) if is_own else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        with _silent_stderr():
            session.start(stop)
        _raise_stopped(job, stop)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # A block that fails must not be dropped: bad videos are outcomes, and everything else ends the run.
        context.max_errored_blocks = 0
        # Ray prints to stdout that an actor died; there, only what the user asked for belongs.
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        session.end(stop)


def _raise_stopped(job: Job, stop: StopRequest) -> None:
    if stop.signal_number is not None:
        raise Stopped(stop.signal_number, f"what was committed is kept in {job.store}; the same command goes on")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's native part tells which log level it was given; what goes wrong is an exception all the same."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _shard_bytes(config: RunConfig) -> int:
    sampling = config.sampling
    return config.store.shard_rows * sampling.num_frames * sampling.crop_size**2 * 3


def _object_store_bytes(config: RunConfig) -> int:
    """Room for the shards that are decoded, wait, or are embedded; at most a third of the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(memory // 3, max(512 << 20, 4 * (num_cores() + 1) * _shard_bytes(config)))


def _dataset(
    ray: Any, items: Sequence[ShardItem], store: str, kind: str, backbone: nn.Module, config: RunConfig, wants_gpu: bool
) -> Any:
    resources = ray.cluster_resources()
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0)) if wants_gpu else 0
    if num_cpus < 2:
        raise LaunchError(
            f"the Ray cluster has {num_cpus} CPUs; decoding and the backbone need one each. Use --workers on one machine."
        )
    # As many actors as CPUs would leave none to decode, and Ray waits for ever (ray issue 44687).
    num_actors = num_gpus or num_cpus // 2
    actor = {"num_gpus": 1, "num_cpus": 0} if num_gpus else {"num_cpus": 1}
    settings = ActorSettings(
        store=store if "://" in store else str(Path(store).absolute()),
        store_kind=kind,
        # The actors fetch it, rather than carry it in the words that make them.
        get_backbone=partial(ray.get, ray.put(backbone)),
        config=config,
        device="cuda" if num_gpus else "cpu",
        num_threads=1,
    )
    rows = [{"item": pickle.dumps(item)} for item in items]
    pool = ray.data.ActorPoolStrategy(min_size=1, max_size=min(num_actors, len(rows)))
    # The memory is what the clips take; besides, Ray would fuse two stages that ask for the same into one.
    return (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(ShardDecoder(), num_cpus=1, memory=_shard_bytes(config))
        .map(ShardActor, fn_constructor_args=[settings], compute=pool, **actor)
    )


def _consume(
    dataset: Any,
    job: Job,
    timeout: float,
    results: list[Mapping[str, Any]],
    on_progress: Callable[[int, int], None],
    stop: StopRequest,
) -> None:
    """Run the dataset in a thread of its own, and watch the ledger meanwhile."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for row in dataset.iter_rows():
                if row["failure"]:
                    raise pickle.loads(row["failure"])
                results.append(json.loads(row["report"]))
        except BaseException as error:  # whatever it is, it belongs to the caller
            errors.append(error)

    thread = threading.Thread(target=run, name="ray", daemon=True)
    store = job.open()
    assert store is not None
    with store:
        thread.start()
        last_done, last_time = -1, time.monotonic()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            counts = store.counts()
            num_rows = sum(counts.values())
            num_done = num_rows - counts["pending"]
            if num_done != last_done:
                last_done, last_time = num_done, time.monotonic()
                on_progress(num_done, num_rows)
            _raise_stopped(job, stop)
            if time.monotonic() - last_time > timeout and thread.is_alive():
                raise RayFailed(
                    f"Ray has committed no shard for {timeout:.0f} s, {counts['pending']} rows are left; what was committed is "
                    "kept. If shards take that long, raise --ray-timeout; else run the same command with --workers in place "
                    "of --engine ray. Ray's own logs are in /tmp/ray/session_latest/logs."
                )
    if errors:
        if type(errors[0]).__module__.startswith("ray."):
            words = " ".join(str(errors[0]).split())[:400]
            raise RayFailed(
                f"Ray ended with {type(errors[0]).__name__}: {words}. What was committed is kept; run the same command "
                "again, or with --workers in place of --engine ray."
            ) from errors[0]
        raise errors[0]
