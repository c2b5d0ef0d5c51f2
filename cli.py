"""The command line. Jobs are imported inside the commands, so that `mastaf --help` loads neither torch nor torchvision."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

ROOMS = ("cache", "configs", "episodes", "extract", "pipeline")


def main() -> None:
    """Entry point of `mastaf`: runs a command and turns errors into one line and an exit code."""
    debug = "--debug" in sys.argv
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    # A script's background jobs begin with SIGINT ignored; all commands hear it, and not just those that save at it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun: every rank would print torch's hints on speed. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        mastaf.main(args=arguments, prog_name="mastaf", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        click.echo(f"mastaf: {' '.join(error.format_message().split())}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped by Ctrl-C; what was finished is kept", err=True)
        sys.exit(130)
    except Exception as error:
        _fail(error, debug)


def _stop(number: int, _frame: object) -> None:
    """Leave on SIGTERM or SIGUSR1 (Slurm's warning): stores commit whole shards, training puts its own handler in place."""
    click.echo(f"stopped by {signal.Signals(number).name}; what was finished is kept", err=True)
    sys.exit(143)


def _fail(error: Exception, debug: bool) -> None:
    """Print one line for an error that the user can mend; let our own mistakes show their traceback."""
    code = getattr(error, "exit_code", 2)
    mendable = type(error).__module__.split(".")[0] in ROOMS or isinstance(error, ValueError | OSError)
    line = f"{_rank()}{' '.join(str(error).split())}"
    if code == 2:
        _tell_launcher(line)
    if debug or not mendable:
        traceback.print_exc()
        sys.exit(code if mendable else 1)
    # All ranks stop together; one of them says it.
    if code not in (130, 143) or os.environ.get("RANK", "0") == "0":
        click.echo(f"mastaf: {line}", err=True)
    sys.exit(code)


def _rank() -> str:
    """Which of several ranks of torchrun this is, to begin a message with."""
    is_one_of_several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return f"rank {os.environ.get('RANK')}: " if is_one_of_several else ""


def _tell_launcher(line: str) -> None:
    """torchrun ends its output with a list of the ranks that failed; there it shows what is in this file."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mastaf")
def mastaf() -> None:
    """Few-shot video classification: embed every video once, then train and compare heads on the cached cubes.

    `--debug` anywhere shows the traceback of an error.
    """


_set = click.option(
    "--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override one key of the config; repeatable."
)
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_json = click.option("--json", "as_json", is_flag=True, help="Print machine-readable results on stdout.")


def _debug() -> list[str]:
    return ["--debug"] if "--debug" in sys.argv else []


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


@mastaf.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("mastaf-demo"),
    show_default=True,
    help="Folder for everything.",
)
@click.option("--quick", is_flag=True, help="A few minutes less: fewer videos and episodes, numbers that mean nothing.")
def demo(out: Path, quick: bool) -> None:
    """All of it on generated videos, on a CPU, in minutes: train, cache, train heads, evaluate, pictures, report."""
    from pipeline.demo import run_demo

    run_demo(out, quick=quick)


@mastaf.group()
def dataset() -> None:
    """Make and check manifests: which video has which class and split."""


@dataset.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Manifest to write (.csv).")
@click.option(
    "--split", default="60/20/20", show_default=True, help="Share of the classes in train/val/test; no class is in two."
)
@click.option("--seed", default=0, show_default=True, help="Of the split of the classes.")
def scan(folder: Path, out: Path, split: str, seed: int) -> None:
    """Manifest of FOLDER: one sub-folder per class, with video files or with one folder of frames per video."""
    from pipeline.dataset_commands import scan_to_file

    scan_to_file(folder, out, split, seed)


@dataset.command()
@click.argument("name")
@click.option(
    "--videos",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with the videos.",
)
@click.option(
    "--lists",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the published list files.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Manifest to write (.csv).")
def splits(name: str, videos: Path, lists: Path | None, out: Path) -> None:
    """Manifest of a published protocol: ucf101, hmdb51, ssv2-part, ssv2-all or kinetics100."""
    from pipeline.dataset_commands import splits_to_file

    splits_to_file(name, videos, lists, out)


@dataset.command()
@click.argument("manifest", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Compare with the published counts of this data set.")
@click.option("--allow-overlap", is_flag=True, help="Report classes or videos in two splits, but do not fail.")
@_json
def check(manifest: Path, name: str | None, allow_overlap: bool, as_json: bool) -> None:
    """Classes and videos per split, missing files, overlaps, split hash."""
    from pipeline.dataset_commands import check_file

    report, lines, is_clean = check_file(manifest, name, allow_overlap)
    if as_json:
        _print_json(report)
    else:
        click.echo("\n".join(lines))
    sys.exit(0 if is_clean else 2)


@dataset.command()
@click.argument("manifest", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--from-store",
    "store",
    required=True,
    help="Store whose rejected videos go.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="New manifest (.csv), with a new split hash."
)
def exclude(manifest: Path, store: str, out: Path) -> None:
    """Write a manifest whose episodes leave out, openly, the videos that extraction rejected."""
    from pipeline.dataset_commands import exclude_to_file

    exclude_to_file(manifest, store, out)


@mastaf.command()
@click.option(
    "--manifest", type=click.Path(path_type=Path), help="Manifest (.csv); default: data.manifest of the config."
)
@click.option("--backbone", help="A name from `mastaf list backbones`.")
@click.option("--weights", help="FILE, random:SEED, pretrained, or none.")
@click.option(
    "--store", help="Store to fill: FOLDER.zarr, FOLDER.h5 or s3://BUCKET/NAME.zarr; default: store.path of the config."
)
@click.option("--store-kind", help="Backend, where the store's ending does not tell.")
@click.option("--config", "recipe", help="Recipe with [sampling], [backbone], [extraction], [store].")
@click.option(
    "--from-run",
    type=click.Path(exists=True, path_type=Path),
    help="Use sampling and trained backbone of an end-to-end run.",
)
@click.option("--retry-failed", is_flag=True, help="Do the rejected videos again, after they were mended.")
@click.option("--strict", is_flag=True, help="Exit with 3 if any video was rejected.")
@click.option("--workers", type=click.IntRange(min=1), help="Do it in N processes on this machine, one GPU each.")
@click.option("--shard", metavar="I/N", help="Do share I of N, from 0. Default: from torchrun or Slurm, or all.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: by Ray Data, on the cluster of RAY_ADDRESS or on this machine; needs mastaf[ray].",
)
@click.option("--ray-timeout", type=click.FloatRange(min=1), help="Seconds without a commit until the run is stopped.")
@click.option("--slurm", type=click.Choice(["print", "submit"]), help="Print or submit a Slurm array that does it.")
@click.option("--slurm-tasks", type=click.IntRange(min=1), help="Number of tasks of the array.")
@click.option("--slurm-option", "slurm_options", multiple=True, metavar="NAME=VALUE", help="Of sbatch; repeatable.")
@_device
@_set
@_json
@click.pass_context
def extract(context: click.Context, /, **options: Any) -> None:
    """Stage 1: decode and embed every video once. What is stored already is skipped."""
    from pipeline.extract_jobs import LaunchOptions, run_extraction
    from pipeline.launch import options_again, serve_parent

    serve_parent()
    as_json, is_strict = options.pop("as_json"), options.pop("strict")
    report = run_extraction(
        options,
        LaunchOptions(
            program=[sys.executable, str(Path(__file__).resolve()), *_debug(), "extract"],
            options=options_again(context),
            **{name: options.pop(name) for name in LaunchOptions.names_of_options()},
        ),
    )
    if isinstance(report, str):
        click.echo(report)
        return
    if as_json:
        _print_json(report)
    sys.exit(3 if is_strict and report["num_rejected"] else 0)


@mastaf.group()
def store() -> None:
    """Look into a store of cubes."""


@store.command()
@click.argument("path")
@click.option("--watch", "is_watched", is_flag=True, help="Show how it fills, until it is complete.")
@click.option(
    "--interval", default=5.0, show_default=True, type=click.FloatRange(min=0.1), help="Of --watch, in seconds."
)
@_json
def info(path: str, is_watched: bool, interval: float, as_json: bool) -> None:
    """What a store holds: counts, shapes, bytes, fingerprint, content hash."""
    if is_watched:
        from pipeline.watch import watch_store

        watch_store(path, interval, as_json)
        return
    from cache.open import open_store
    from cache.summary import summarise

    with open_store(path) as opened:
        facts = summarise(opened)
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        click.echo(f"{name:<16} {value if not isinstance(value, dict | list) else json.dumps(value)}")


@store.command("failures")
@click.argument("path")
@_json
def failures_command(path: str, as_json: bool) -> None:
    """Every video that is not ok, with its reason."""
    from cache.open import open_store
    from cache.summary import failures

    with open_store(path) as opened:
        rows = failures(opened)
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['status']:<9} {row['reason']:<22} {row['video_id']}"
            + (f"  ({row['detail']})" if row.get("detail") else "")
        )
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["reason"]] = counts.get(row["reason"], 0) + 1
    click.echo(
        f"{len(rows)} videos are not ok" + "".join(f"; {reason}: {count}" for reason, count in sorted(counts.items())),
        err=True,
    )


_workers = click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Files read at the same time."
)


@store.command("verify")
@click.argument("path")
@click.option("--fast", "is_fast", is_flag=True, help="Compare sizes of data files instead of reading them.")
@_workers
@_json
def verify_command(path: str, is_fast: bool, workers: int, as_json: bool) -> None:
    """Check every byte of a store against its checksums; exit 0 when whole, 1 when damaged. Changes nothing."""
    from pipeline.store_commands import verify_store

    report, is_whole = verify_store(path, is_fast, workers)
    if as_json:
        _print_json(report)
    sys.exit(0 if is_whole else 1)


@store.command("repair")
@click.argument("path")
@click.option(
    "--manifest",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Where the videos of damaged rows are; without it these rows stay pending.",
)
@click.option("--weights", help="Weights file, where it is no longer where it was at the extraction.")
@click.option("--allow-outside", is_flag=True, help="Accept videos outside of the manifest's root.")
@_device
@_workers
@_json
def repair_command(
    path: str, manifest: Path | None, weights: str | None, device: str, workers: int, allow_outside: bool, as_json: bool
) -> None:
    """Restore what the store itself knows, drop damaged shards, and extract these anew; touches nothing else.

    With --manifest, nothing is dropped unless it can be made again from the same files.
    """
    from pipeline.store_commands import repair_store

    report, is_complete = repair_store(path, manifest, weights, device, workers, allow_outside)
    if as_json:
        _print_json(report)
    sys.exit(0 if is_complete else 1)


@store.command("remove")
@click.argument("path")
@click.argument("video_ids", nargs=-1)
@click.option(
    "--from",
    "listed",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with one video id per line.",
)
@_json
def remove_command(path: str, video_ids: tuple[str, ...], listed: Path | None, as_json: bool) -> None:
    """Take videos out of a store without rewriting its shards."""
    from pipeline.store_commands import remove_from_store

    report = remove_from_store(path, video_ids, listed)
    if as_json:
        _print_json(report)


@store.command("convert")
@click.argument("source")
@click.argument("target")
@click.option("--store-kind", "kind", help="Backend of the target, where its ending does not tell.")
@click.option("--dtype", help="float16 or float32; default: as it is.")
@click.option("--shard-rows", type=click.IntRange(min=1), help="Rows per shard; default: as it is.")
@click.option("--compression", default="none", show_default=True, help="none, zstd (Zarr only) or gzip.")
@_json
def convert_command(as_json: bool, **options: Any) -> None:
    """Copy the finished rows of SOURCE into TARGET: another backend, number type, shard size or compression."""
    from pipeline.store_commands import convert_store

    report = convert_store(**options)
    if as_json:
        _print_json(report)


@store.command("plan")
@click.argument("path")
@click.option("--manifest", type=click.Path(path_type=Path), help="Manifest (.csv).")
@click.option("--backbone", help="A name from `mastaf list backbones`.")
@click.option("--weights", help="FILE, random:SEED, pretrained, or none.")
@click.option("--config", "recipe", help="Recipe with [sampling], [backbone], [extraction], [store].")
@click.option(
    "--from-run",
    type=click.Path(exists=True, path_type=Path),
    help="Use sampling and trained backbone of an end-to-end run.",
)
@click.option(
    "--sample",
    "num_sampled",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    help="Videos to measure with; at least four forward batches are taken.",
)
@click.option("--processes", "num_processes", default=1, show_default=True, type=click.IntRange(min=1))
@_device
@_set
@_json
def plan_command(as_json: bool, **options: Any) -> None:
    """Bytes, files and hours that filling PATH will take, measured on a sample; PATH is not touched."""
    from pipeline.store_plan import plan_store

    plan = plan_store(**options)
    if as_json:
        _print_json(plan)


@mastaf.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; default: runs/RECIPE.")
@click.option("--resume", is_flag=True, help="Go on from the run's newest good checkpoint.")
@click.option(
    "--resume-or-start",
    is_flag=True,
    help="Go on where there is a run, else begin: for jobs that a cluster starts again with the same command.",
)
@click.option(
    "--heads",
    metavar="A,B,C",
    help="Train these heads (or `all`) on one pass of the cache, each a run below --out; --set heads.NAME.key=value is for one of them.",
)
@_device
@_set
def train(
    recipe: str,
    out: Path | None,
    resume: bool,
    resume_or_start: bool,
    heads: str | None,
    device: str,
    overrides: tuple[str, ...],
) -> None:
    """Stage 2, end to end or classification: train as RECIPE says (a TOML file, or the name of one that ships).

    On several GPUs or machines: torchrun --nproc-per-node N "$(which mastaf)" train RECIPE ...
    """
    if resume and resume_or_start:
        raise click.UsageError(
            "--resume and --resume-or-start exclude each other: the first one needs a run to go on from."
        )
    goes_on = None if resume_or_start else resume
    if heads is not None:
        from pipeline.train_heads import train_heads

        train_heads(recipe, heads, out, goes_on, device, overrides)
        return
    from pipeline.train_command import train_recipe

    train_recipe(recipe, out, goes_on, device, overrides)


@mastaf.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--split", help="train, val or test; default: evaluation.split of the run.")
@click.option("--episodes", type=click.IntRange(min=1), help="Default: evaluation.episodes of the run (10,000).")
@click.option("--shots", type=click.IntRange(min=1), help="Another k_shot than the run was trained with.")
@click.option("--queries", type=click.IntRange(min=1), help="Another n_query than the run was trained with.")
@click.option("--store", "store_path", help="Score on this store instead of the run's own source.")
@click.option(
    "--manifest",
    type=click.Path(exists=True, dir_okay=False),
    help="Another manifest, such as one without rejected videos.",
)
@_device
@_json
def evaluate(**options: Any) -> None:
    """Mean accuracy and 95 % interval of RUN over seeded episodes, with the hashes of what made the number."""
    from pipeline.train_command import EvaluationRequest, evaluate_folder

    as_json, device = options.pop("as_json"), options.pop("device")
    result, line = evaluate_folder(EvaluationRequest(**options), device)
    if os.environ.get("RANK", "0") != "0":  # of several ranks, the first speaks
        return
    if as_json:
        _print_json(result)
    else:
        click.echo(line)


@mastaf.command()
@click.argument("card", type=click.Path(exists=True, path_type=Path))
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Only the evaluations on this split.")
@click.option("--store", "store_path", help="Read the cubes there, instead of what the card says.")
@click.option("--manifest", type=click.Path(exists=True, dir_okay=False), help="Where the manifest is now.")
@_device
@_json
def reproduce(card: Path, as_json: bool, **options: Any) -> None:
    """Run every evaluation of CARD (a run's folder, or its card.json) again; exit 0 when all is identical, 1 when not."""
    from pipeline.reproduce_command import reproduce as run

    result = run(card, **options)
    if os.environ.get("RANK", "0") == "0":  # of several ranks, the first speaks
        if as_json:
            _print_json(result.to_json())
        else:
            click.echo(result.to_text())
    sys.exit(0 if result.is_identical else 1)


@mastaf.group()
def bench() -> None:
    """Speed and FLOPs, against named baselines."""


@bench.command("compute")
@click.option("--frames", default="8,10,12,14,16", show_default=True, help="Numbers of frames.")
@click.option("--shots", "k_shot", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--size", "crop_size", default=224, show_default=True, type=click.IntRange(min=32), help="Pixels.")
@click.option(
    "--repeats", default=3, show_default=True, type=click.IntRange(min=0), help="Timed episodes each; 0: count only."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for compute.json, compute.csv and compute.png.")
@_device
@_json
def bench_compute(as_json: bool, **options: Any) -> None:
    """FLOPs and time of an episode with TRX, MASTAF-TSN and MASTAF-R3D by frames (MASTAF paper, Figures 4 and 5)."""
    from pipeline.compute_figure import bench_compute as run

    result = run(**options)
    if as_json:
        _print_json(result)


@mastaf.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--split", help="train, val or test; default: evaluation.split of the runs.")
@click.option("--episodes", type=click.IntRange(min=2), help="Default: evaluation.episodes of the runs.")
@click.option("--shots", type=click.IntRange(min=1), help="Another k_shot than the runs were trained with.")
@click.option("--queries", type=click.IntRange(min=1), help="Another n_query than the runs were trained with.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the episodes; default: evaluation.seed of the runs.")
@click.option("--store", "store_path", help="Score all runs on this store instead of their own.")
@click.option("--manifest", type=click.Path(exists=True, dir_okay=False), help="Another manifest for all runs.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for compare.json, .csv, .png and episodes.npz.")
@_device
@_json
def compare(**options: Any) -> None:
    """Score RUNS on the same episodes: accuracy, paired difference to the first run, intervals, cost of the heads.

    Runs that differ in nothing but seeds also get a row with their mean. docs/compare.md explains every number.
    """
    from pipeline.compare_command import compare_folders

    as_json = options.pop("as_json")
    report, text = compare_folders(**options)
    if as_json:
        _print_json(report)
    else:
        click.echo(text)


@mastaf.command()
@click.argument("config")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of everything; default: runs/CONFIG.")
@click.option(
    "--redo", multiple=True, metavar="STAGE", help="Make this stage again; what it made is set aside. Repeatable."
)
@click.option("--dry-run", "is_dry", is_flag=True, help="Say what is done and what is to do, and why; do nothing.")
@_device
@_set
@_json
def pipeline(
    config: str,
    out: Path | None,
    redo: tuple[str, ...],
    is_dry: bool,
    device: str,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train the backbone, cache its cubes, train heads on them and compare, as CONFIG says; finished stages are skipped.

    CONFIG is a TOML file, or the name of one that ships. --set pipeline.key=value changes it, every other key is for all its
    recipes. Stopped anywhere, the same command goes on.
    """
    from pipeline.whole_pipeline import run_pipeline

    facts, text = run_pipeline(config, out, overrides, device, redo, is_dry)
    if as_json:
        _print_json(facts)
    else:
        click.echo(text)


@mastaf.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--split", help="train, val or test; default: evaluation.split of the run.")
@click.option(
    "--episode", default=0, show_default=True, type=click.IntRange(min=0), help="Of those that evaluate draws."
)
@click.option("--query", type=click.IntRange(min=0), help="Draw this query only, from 0; default: all.")
@click.option("--store", "store_path", help="Read the cubes from this store instead of the run's own source.")
@click.option("--manifest", type=click.Path(exists=True, dir_okay=False), help="Another manifest of the same videos.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write; default: RUN/maps/SPLIT_EPISODE.")
@click.option("--gif", "with_gifs", is_flag=True, help="Write GIFs beside the PNGs.")
@_device
@_json
def maps(as_json: bool, **options: Any) -> None:
    """Draw what the head of RUN sees in one episode (attention, alignments, ...) over the frames of its videos."""
    from pipeline.maps_command import draw_run_maps

    record, written = draw_run_maps(**options)
    if as_json:
        _print_json(record)
    else:
        click.echo("\n".join(str(path) for path in written))


@mastaf.command("list")
@click.argument("what", type=click.Choice(["backbones", "heads", "datasets", "recipes", "pipelines"]))
@click.argument("name", required=False)
@_json
def list_command(what: str, name: str | None, as_json: bool) -> None:
    """What there is to choose from; `mastaf list heads NAME` shows that head's options with their defaults."""
    if name is not None and what != "heads":
        raise click.UsageError(f"only heads have options to list; `mastaf list {what}` takes no name, got {name!r}.")
    rows = _LISTS[what]() if name is None else _list_options(name)
    if as_json:
        _print_json(rows)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        click.echo(f"{row['name']:<{width}}  {row['description']}")


def _list_backbones() -> list[dict[str, str]]:
    from extract.build import BACKBONES

    return [{"name": name, "description": entry.description} for name, entry in BACKBONES.items()]


def _list_heads() -> list[dict[str, str]]:
    from episodes.build import HEADS

    mark = {True: " Experimental.", False: ""}
    return [
        {"name": name, "description": entry.description + mark[entry.is_experimental]} for name, entry in HEADS.items()
    ]


def _list_options(head: str) -> list[dict[str, str]]:
    from episodes.build import HEADS, head_config

    defaults = head_config(head, {}).model_dump(mode="json")
    fields = HEADS[head].config.model_fields
    return [
        {
            "name": f"head.{key} = {json.dumps(defaults[key])}",
            "description": " ".join((field.description or "").split()),
        }
        for key, field in fields.items()
        if key not in HEADS[head].fixed
    ]


def _list_datasets() -> list[dict[str, str]]:
    from episodes.splits import DATASETS

    return [{"name": name, "description": entry.title} for name, entry in DATASETS.items()]


def _list_recipes() -> list[dict[str, str]]:
    from configs.load import recipe_folder

    return _list_files(recipe_folder())


def _list_pipelines() -> list[dict[str, str]]:
    from configs.load import recipe_folder

    return _list_files(recipe_folder() / "pipelines")


def _list_files(folder: Path) -> list[dict[str, str]]:
    files = sorted(folder.glob("*.toml"))
    return [
        {"name": file.stem, "description": file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")}
        for file in files
    ]


_LISTS: dict[str, Callable[[], list[dict[str, str]]]] = {
    "backbones": _list_backbones,
    "heads": _list_heads,
    "datasets": _list_datasets,
    "recipes": _list_recipes,
    "pipelines": _list_pipelines,
}


if __name__ == "__main__":
    main()
