"""`dltask doctor`: what a service needs, checked one by one, each with what to do about it."""

import shutil
from functools import partial

import anyio.to_thread

from handlers.errors import StartupError
from handlers.store import connect_store
from handlers.store.database import masked
from service.checks import Check, halves, machine
from service.checks.database import database
from service.checks.gpu import ask_child, checks_of_child, child_python, why_no_gpu
from service.checks.nvidia import Driver, ask_driver, has_gpu
from service.secrecy import child_environment
from service.settings import Settings


async def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which they should be mended."""
    uri = settings.mongodb_uri.get_secret_value()
    checks = [Check("settings", "ok", f"database {settings.database} at {masked(uri, uri)}")]
    try:
        async with connect_store(uri, settings.database) as store:
            checks += await database(store, settings)
    except StartupError as error:
        checks.append(Check("database", "failed", *halves(masked(str(error), uri))))
    checks += await anyio.to_thread.run_sync(partial(_machine, settings))
    return checks


def _machine(settings: Settings) -> list[Check]:
    environment = child_environment(settings.mongodb_uri.get_secret_value())
    python = child_python(settings.child_command)
    wanted = settings.gpu_devices != 0
    # A program that is not ours may be anything: that it can be started is all there is to see.
    facts = ask_child(python, environment, run=wanted and has_gpu()) if python is not None else None
    gpus = settings.gpu_devices or 0
    libraries: list[Check] = []
    if facts is None:
        libraries = [_other_child(settings.child_command)]
        gpu = Check("GPU", "ok", f"{gpus} by DLTASK_GPU_DEVICES, for a child that is not ours")
    else:
        driver = ask_driver(environment) if wanted else None
        problem = why_no_gpu(facts, driver) if wanted and has_gpu() else None
        usable = facts.gpus if not isinstance(facts, str) and problem is None and wanted and has_gpu() else 0
        gpu = _gpu(settings, usable, driver or Driver(), problem)
        libraries = checks_of_child(facts, gpu=usable > 0)
        gpus = usable if settings.gpu_devices is None else min(gpus, usable)
    return [
        machine.cache(settings),
        machine.memory(max(1, settings.cpu_devices + gpus)),
        machine.processors(settings),
        machine.shared_memory(gpus),
        *libraries,
        gpu,
        machine.http_port(settings),
    ]


def _gpu(settings: Settings, usable: int, driver: Driver, problem: tuple[str, str] | None) -> Check:
    fallback = settings.gpu_fallback == "cpu"
    if settings.gpu_devices == 0:
        return Check("GPU", "ok", "none wanted (DLTASK_GPU_DEVICES=0)")
    if problem is not None:
        return Check("GPU", "warning" if fallback and not settings.gpu_devices else "failed", *problem)
    if settings.gpu_devices is not None and usable < settings.gpu_devices:
        found = f"DLTASK_GPU_DEVICES is {settings.gpu_devices}; torch can use {usable}"
        return Check(
            "GPU", "failed", found, "set it to what is there, or see to the driver and to CUDA_VISIBLE_DEVICES"
        )
    if usable and driver.problem:
        return Check("GPU", "warning", f"torch can use {usable}, but {driver.problem}", driver.fix)
    if usable:
        return Check("GPU", "ok", "; ".join(driver.gpus) or f"{usable} that torch can use")
    if fallback:
        return Check("GPU", "ok", "none: tasks for a GPU run on the CPU (DLTASK_GPU_FALLBACK=cpu)")
    return Check("GPU", "ok", "none", "tasks for a GPU wait for another worker; DLTASK_GPU_FALLBACK=cpu runs them here")


def _other_child(command: tuple[str, ...]) -> Check:
    program = command[0]
    found = f"DLTASK_CHILD_COMMAND is {' '.join(command)[:200]}"
    if shutil.which(program) is None:
        return Check("child", "failed", found, f"{program} is no program that can be started")
    return Check("child", "ok", found)
