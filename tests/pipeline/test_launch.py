"""Which part of a job a process is, what `--slurm` writes, and what a watcher sees."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache.cube import ArraySpec, Spec
from cache.open import open_disk_store
from cache.store import RowOutcome, Shard
from pipeline.extract_jobs import LaunchOptions
from pipeline.job import Job, note_start, report_job
from pipeline.launch import WORKER, LaunchError, Place, device_name, find_place, num_cores, refuse_nested_workers
from pipeline.shares import Share
from pipeline.slurm import SlurmJob, parse_options, submit
from pipeline.watch import Watcher, watch_store

SPEC = Spec(
    decoder={"name": "none"}, sampling={}, backbone={"name": "none"}, weights_digest="0", compute={},
    arrays={"cube": ArraySpec("last", "none", "float32", None, (1, 1, 1, 1))},
)  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2",
}  # fmt: skip
SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("shard", "environment", "place"),
    [
        (None, {}, Place(Share(0, 1), 0, 1)),
        ("3/16", {}, Place(Share(3, 16), 0, 1)),
        (None, TORCHRUN, Place(Share(5, 8), 1, 4)),
        (None, ARRAY, Place(Share(2, 4), 0, 1)),
        (None, SRUN, Place(Share(3, 6), 1, 2)),
        ("1/2", ARRAY, Place(Share(1, 2), 0, 1)),
        ("5/8", TORCHRUN, Place(Share(5, 8), 1, 4)),
        ("3/6", SRUN, Place(Share(3, 6), 1, 2)),
        ("0/2", SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Place(Share(0, 2), 1, 2)),
        ("15/24", SRUN | ARRAY, Place(Share(15, 24), 1, 2)),
        (None, {WORKER: "1/4"}, Place(Share(1, 4, True, 4), 1, 4)),
    ],
)
def test_share_and_place_follow_from_option_and_environment(
    shard: str | None, environment: dict[str, str], place: Place
) -> None:
    assert find_place(shard, environment) == place


def test_batch_shell_of_many_tasks_is_one_process() -> None:
    """sbatch sets SLURM_NTASKS and SLURM_PROCID for its one shell, too; only within a step do they count processes."""
    assert find_place(None, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).share == Share(0, 1)


def test_ranks_within_an_array_split_its_shares_once_more() -> None:
    assert find_place(None, TORCHRUN | ARRAY).share == Share(2 * 8 + 5, 4 * 8)
    assert find_place(None, SRUN | ARRAY).share == Share(2 * 6 + 3, 4 * 6)


def test_workers_of_one_machine_help_each_other_and_nobody_else() -> None:
    shards = [Shard(index, ()) for index in range(24)]
    groups = [
        [find_place(f"{machine}/3", {WORKER: f"{index}/2"}).share.pick(shards) for index in range(2)]
        for machine in range(3)
    ]
    for machine, (first, second) in enumerate(groups):
        assert {shard.index for shard in first} == {shard.index for shard in second}
        assert first[0] != second[0], "helpers begin with their own shards"
        assert sorted(shard.index for shard in first) == [i for i in range(24) if i % 6 // 2 == machine]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_static_shares_are_disjoint_and_leave_nothing_out(count: int) -> None:
    shards = [Shard(index, ()) for index in range(20)]
    picked = [shard.index for index in range(count) for shard in Share(index, count).pick(shards)]
    assert sorted(picked) == list(range(20))


@pytest.mark.parametrize("shard", ["", "1", "2/2", "a/b", "-1/2", "1/0", "1/2/3", "0/1e3"])
def test_malformed_share_is_refused_with_its_value(shard: str) -> None:
    with pytest.raises(LaunchError, match="INDEX/COUNT") as error:
        find_place(shard, {})
    assert repr(shard) in str(error.value)


@pytest.mark.parametrize(
    ("shard", "environment", "words"),
    [
        ("0/2", TORCHRUN, "same share"),
        ("3/16", SRUN, "3 of 6 of srun: all ranks would do the same share"),
        ("3/16", SRUN | ARRAY, "same share"),
        (None, {"RANK": "1"}, "WORLD_SIZE is not set"),
        (None, {"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        (None, {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
        (None, ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2"}, "has gaps"),
        (None, ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, "has gaps"),
        (None, {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        (None, SRUN | {"SLURM_PROCID": "6"}, "SLURM_PROCID=6"),
    ],
)
def test_contradicting_environment_is_refused(shard: str | None, environment: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        find_place(shard, environment)


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN])
def test_workers_within_the_processes_of_a_launcher_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="both start processes"):
        refuse_nested_workers(environment)
    refuse_nested_workers(ARRAY)
    refuse_nested_workers({"RANK": "0", "WORLD_SIZE": "1"})


def test_each_process_of_a_machine_has_its_gpu_and_its_part_of_the_cores() -> None:
    devices = [device_name("auto", find_place(None, {WORKER: f"{index}/5"}), 2) for index in range(5)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert device_name("auto", find_place(None, TORCHRUN), 8) == "cuda:1"
    assert device_name("cpu", find_place(None, TORCHRUN), 8) == "cpu"
    assert device_name("auto", Place(), 0) == "auto"
    assert num_cores({WORKER: "0/1000"}) == 1
    assert num_cores({WORKER: "0/2"}) == max(1, num_cores({}) // 2)


def test_tasks_of_an_array_with_gaps_have_cores_when_their_share_is_told() -> None:
    """`sbatch --array=3,7 script` repeats two tasks of a printed script, which writes each share out."""
    told = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "2"}
    gaps = {**told, "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_STEP": "1"}
    assert find_place("7/16", gaps) == Place(Share(7, 16))
    assert num_cores(gaps) == num_cores({})
    assert num_cores(gaps | {WORKER: "1/2"}) == num_cores({WORKER: "1/2"})
    with pytest.raises(LaunchError, match="has gaps"):
        find_place(None, gaps)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"engine": "ray", "workers": 2}, "both spread the work"),
        ({"engine": "ray", "slurm": "print", "slurm_tasks": 2}, "both spread the work"),
        ({"ray_timeout": 5.0}, "--engine ray"),
        ({"slurm_tasks": 3}, "--slurm print"),
        ({"slurm": "print"}, "--slurm-tasks"),
        ({"slurm": "print", "slurm_tasks": 3, "shard": "0/2"}, "Leave --shard out"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given: dict[str, object], words: str) -> None:
    defaults: dict[str, object] = {
        "program": [], "options": {}, "shard": None, "workers": None, "engine": "local", "ray_timeout": None,
        "slurm": None, "slurm_tasks": None, "slurm_options": (),
    }  # fmt: skip
    with pytest.raises(LaunchError, match=words):
        LaunchOptions(**(defaults | given))  # type: ignore[arg-type]


def slurm_script(folder: Path, *options: str, words: tuple[str, ...] = ("echo",), num_tasks: int = 4) -> str:
    return SlurmJob(words, num_tasks, folder / "my cubes%.zarr", folder, parse_options(options)).script()


def test_slurm_script_is_bash_and_holds_what_was_asked_for(tmp_path: Path) -> None:
    words = ("python", "x y.py", "--set", 'a.b="$HOME"')
    script = slurm_script(tmp_path, "partition=gpu", "--exclusive", "comment=two words", words=words)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    head = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"partition=gpu", "exclusive", 'comment="two words"', "array=0-3", "requeue", "open-mode=append"} <= set(
        head
    )
    assert f'output="{tmp_path}/my cubes%%.zarr.slurm-%A_%a.log"' in head
    assert script.splitlines()[0] == "#!/bin/bash"
    assert """python 'x y.py' --set 'a.b="$HOME"' --shard "$SLURM_ARRAY_TASK_ID/4" &""" in script


@pytest.mark.parametrize("option", ["array=0-9", "ntasks=4", "p gpu", "-p=gpu", "mem=1\n#SBATCH --x", "requeue"])
def test_slurm_options_that_would_break_the_script_are_refused(option: str) -> None:
    with pytest.raises(LaunchError, match="--slurm-option"):
        parse_options([option])


def test_slurm_log_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="Make the folder first"):
        slurm_script(tmp_path / "absent")


def test_slurm_script_hands_on_the_exit_code_and_goes_on_after_a_time_limit(tmp_path: Path) -> None:
    """A task that was warned and saved what it had is queued again; one that failed is not."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/bash\necho "$@" >> "{tmp_path}/requeued"\n')
    scontrol.chmod(0o755)
    environment = {
        "PATH": f"{scontrol.parent}:/usr/bin:/bin", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3",
    }  # fmt: skip

    def run(words: str) -> int:
        script = slurm_script(tmp_path, words=("bash", "-c", words))
        return subprocess.run(["bash", "-c", script], env=environment, check=False).returncode

    assert run("exit 0") == 0
    assert run("exit 3") == 3
    assert run("kill -TERM $PPID; sleep 0.3; exit 143") == 143
    assert not (tmp_path / "requeued").exists()
    assert run("trap 'exit 143' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done") == 0
    assert (tmp_path / "requeued").read_text() == "requeue 12_3\n"


def test_submit_says_what_sbatch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no `sbatch` here"):
        submit("text")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        '#!/bin/bash\nread text\n[ "$text" = good ] && echo "job 7" || { echo "bad text" >&2; exit 5; }\n'
    )
    sbatch.chmod(0o755)
    assert submit("good\n") == "job 7"
    with pytest.raises(LaunchError, match=r"exit code 5\): bad text"):
        submit("else\n")


def test_watcher_counts_rows_of_all_writers_and_names_them(tmp_path: Path) -> None:
    outcomes = [RowOutcome("ok"), RowOutcome("degraded", "short_video"), RowOutcome("rejected", "missing")]
    values = {"cube": np.zeros((3, 1, 1, 1, 1), dtype=np.float32)}
    path = tmp_path / "s.zarr"
    with open_disk_store(path, "zarr", SPEC, "a", shard_rows=3) as writer, open_disk_store(path, "zarr") as reader:
        watcher = Watcher(reader)
        writer.plan([str(number) for number in range(6)], [0])
        first, second = writer.pending()
        writer.claim(first)
        look = watcher.look()
        assert (look.num_rows, look.num_done, look.rows_per_second) == (6, 0, None)
        assert list(look.writers.values()) == [[0]]
        assert "(shard 0)" in look.in_words()
        writer.commit(first, values, outcomes)
        look = watcher.look()
        assert (look.num_ok, look.num_degraded, look.num_rejected, look.is_complete) == (1, 1, 1, False)
        assert look.rows_per_second is not None
        assert look.rows_per_second > 0
        assert "nobody is writing" in look.in_words()
        writer.commit(second, values, outcomes)
        writer.remove(["5"])
        look = watcher.look()
        assert (look.num_rows, look.num_rejected, look.is_complete) == (5, 1, True)
        writer.replan([key for key in writer.rows() if key.video_id == "0"])
        look = watcher.look()
        assert (look.num_rows, look.num_ok, look.is_complete) == (5, 1, False)


def test_store_that_is_being_made_is_watched_and_one_that_was_emptied_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with open_disk_store(path, "zarr", SPEC, "a", shard_rows=3) as writer, open_disk_store(path, "zarr") as reader:
        watcher = Watcher(reader)
        assert not watcher.look().is_complete
        writer.plan(["a", "b"], [0])
        assert not watcher.look().is_complete
        writer.remove(["a", "b"])
        assert watcher.look().is_complete
    watch_store(str(path), 0.01, as_json=True)


def test_rows_of_another_manifest_are_not_said_to_be_finished_by_the_same_command(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with open_disk_store(path, "zarr", SPEC, "a", shard_rows=3) as store:
        store.plan(["a", "b", "c", "d", "e", "f", "g"], [0])  # shards: a b c, d e f, g
        store.remove(["e"])
        job = Job(str(path), None, ["a", "b", "c", "d"], [0], Share())
        report = report_job(job, note_start(job), [])
        assert (report.num_rows_elsewhere, report.num_rows_left, report.num_pending) == (3, 3, 4)
        first = store.pending()[0]
        values = {"cube": np.zeros((3, 1, 1, 1, 1), dtype=np.float32)}
        store.commit(first, values, [RowOutcome("ok")] * 3)
        report = report_job(job, note_start(job), [])
        assert (report.num_rows_elsewhere, report.num_rows_left, report.num_pending) == (0, 3, 1)
        assert job.num_rows_left() == 0
        report = report_job(replace(job, share=Share(0, 2)), note_start(job), [])
        assert (report.num_rows_elsewhere, report.num_rows_left) == (0, 1), "shards 0 and 2"
