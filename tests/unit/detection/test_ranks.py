"""Several devices train as one: the batch is shared out, all stop at the same iteration, an error of one ends all."""

import os
import select
import signal
from pathlib import Path

import pytest
from drawn import make_job, parse_events, write_job
from test_child import child, run

from handlers.detection.job import Failed, Note, Snapshot, Started, Stopped, Trained
from handlers.detection.ranks import Ranks

TWO = ["cpu", "cpu"]


@pytest.mark.parametrize(("batch_size", "size"), [(10, 1), (10, 2), (10, 3), (3, 4), (1, 2)])
def test_every_rank_has_its_share_of_the_batch(batch_size: int, size: int) -> None:
    """Together they are the batch, once; each rank has one image at least."""
    shares = [list(Ranks(rank, size).share(batch_size)) for rank in range(size)]
    assert [place for share in shares for place in share] == list(range(max(batch_size, size)))
    assert all(shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_ranks_train_one_model(tmp_path: Path) -> None:
    """The events are those of one training: one start, one snapshot an interval, one model."""
    job = make_job(tmp_path, devices=TWO, max_num_iters=2, batch_size=1)
    (tmp_path / "images" / "3.png").write_bytes(b"")
    code, events, err = run(write_job(tmp_path, job))
    assert code == 0, err
    trained = events[-1]
    assert isinstance(trained, Trained)
    assert trained.device == "cpu, cpu"
    assert (trained.images.used, trained.images.skipped) == (11, 1)
    assert [event.device for event in events if isinstance(event, Started)] == ["cpu, cpu"]
    assert [event.iteration for event in events if isinstance(event, Snapshot)] == [2]
    assert [event.message for event in events if isinstance(event, Note)] == [
        "batch_size is 2 instead of 1: one image for each device"
    ]


def test_patience_ends_all_ranks_together(tmp_path: Path) -> None:
    """Only rank 0 knows what was measured; all end at the iteration at which it has been no better for long enough."""
    # A rate with which nothing is learnt: each look is as good as the first.
    job = make_job(tmp_path, devices=TWO, max_num_iters=20, snap_shot_ivterval=20, inital_learning_rate=1e-12)
    code, events, err = run(write_job(tmp_path, job.model_copy(update={"patience": 3})))
    assert code == 0, err
    trained = events[-1]
    assert isinstance(trained, Trained)
    assert trained.iterations == 6


def test_ranks_stop_together(tmp_path: Path) -> None:
    """SIGTERM to the launcher: one snapshot, Stopped, exit code 0."""
    job = make_job(tmp_path, devices=TWO, max_num_iters=100_000, snap_shot_ivterval=50_000)
    with child() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{write_job(tmp_path, job)}\n")
        process.stdin.flush()
        seen = [process.stdout.readline()]
        while '"progress"' not in seen[-1]:
            assert seen[-1], process.stderr.read() if process.stderr else ""
            seen.append(process.stdout.readline())
        process.terminate()
        seen += process.stdout.readlines()
        assert process.wait() == 0
    events = parse_events("".join(seen))
    snapshot, stopped = events[-2:]
    assert isinstance(snapshot, Snapshot)
    assert isinstance(stopped, Stopped)
    assert snapshot.iteration == stopped.iteration
    assert [event.event for event in events].count("snapshot") == 1 + stopped.iteration // 50_000


def test_an_error_in_the_ranks_is_one_failure(tmp_path: Path) -> None:
    """Whichever rank says it first."""
    job = make_job(tmp_path, devices=TWO, inital_learning_rate=1e30, max_num_iters=50)
    code, events, _ = run(write_job(tmp_path, job))
    assert code == 1
    failures = [event for event in events if isinstance(event, Failed)]
    assert [failure.kind for failure in failures] == ["loss"]
    assert sum(f"{number:024x}" in failures[0].message for number in range(1, 13)) == 4


def test_a_killed_rank_ends_the_attempt(tmp_path: Path) -> None:
    """The others do not wait for it, and no process is left. Nobody calls it a bug: a child that died is retried."""
    job = make_job(tmp_path, devices=TWO, max_num_iters=100_000)
    with child() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{write_job(tmp_path, job)}\n")
        process.stdin.flush()
        while '"progress"' not in process.stdout.readline():
            assert process.poll() is None
        ranks = rank_pids(process.pid)
        assert len(ranks) == 2
        handles = [os.pidfd_open(pid) for pid in ranks]
        signal.pidfd_send_signal(handles[1], signal.SIGKILL)
        events = parse_events(process.stdout.read())
        assert process.wait() == 1
    assert not [event for event in events if isinstance(event, Failed | Stopped | Trained)]
    for handle in handles:
        # A pidfd becomes readable when its process ends.
        assert select.select([handle], [], [], 60)[0]
        os.close(handle)


def rank_pids(launcher: int) -> list[int]:
    """The processes that the launcher spawned as ranks, the tracker of multiprocessing apart."""
    lists = Path(f"/proc/{launcher}/task").glob("*/children")
    pids = sorted(int(pid) for path in lists for pid in path.read_text().split())
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
