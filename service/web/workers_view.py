"""Workers as templates show them. Every value may be anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.show import number, part
from service.web.text import clip
from service.web.view import task_url

#: Running tasks named of one worker.
_MOST_RUNNING = 20


@dataclass(frozen=True)
class WorkerLine:
    """One live worker."""

    name: Any
    host: Any
    pid: Any
    version: Any
    seen: Any
    #: `2 CPU`, for each kind that it has; and of these the free ones.
    devices: Sequence[str]
    free: Sequence[str]
    #: What is said of its devices besides.
    remarks: Sequence[str]
    #: Text and address of each attempt that it runs; the address is empty where it names no task.
    running: Sequence[tuple[str, str]]
    running_left_out: int
    #: Class and words of its state.
    chip: str
    state: str


def worker_line(worker: Mapping[str, Any]) -> WorkerLine:
    """The line of one worker."""
    has = {str(kind): number(value) for kind, value in list(part(worker, "devices").items())[:10]}
    devices = [kind for kind, value in has.items() if value > 0]
    free = part(worker, "free")
    running = worker.get("running")
    attempts = running if isinstance(running, list) else []
    remarks = []
    if worker.get("fallback") is True:
        remarks.append("runs GPU tasks on its CPUs too")
    if number(worker.get("min_device_num")) > 1:
        remarks.append(f"tasks of {number(worker.get('min_device_num')):g} devices or more")
    chip, state = ("failed", "resting") if worker.get("resting") is True else ("succeeded", "taking tasks")
    return WorkerLine(
        name=worker.get("_id"),
        host=worker.get("host"),
        pid=worker.get("pid"),
        version=worker.get("version"),
        seen=worker.get("renewed_at"),
        devices=[f"{has[kind]:g} {clip(kind, 12)}" for kind in devices],
        free=[f"{number(free.get(kind)):g} {clip(kind, 12)}" for kind in devices],
        remarks=remarks,
        running=[_attempt(entry) for entry in attempts[:_MOST_RUNNING]],
        running_left_out=max(0, len(attempts) - _MOST_RUNNING),
        chip=chip if devices else "pending",
        state=state if devices else "has no devices",
    )


def _attempt(entry: Any) -> tuple[str, str]:
    # `7/2` is the second attempt at task 7.
    task, slash, attempt = clip(entry, 40).partition("/")
    return (f"{task} (attempt {attempt})" if slash else task, task_url(int(task)) if _is_number(task) else "")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 20
