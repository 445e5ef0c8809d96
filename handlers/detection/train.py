"""One attempt at a training, top to bottom: data, network, iterations, best weights, export, measurement."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from handlers.detection.augment import ALWAYS, MIRRORED
from handlers.detection.batch_norm import calibrate_batch_norm
from handlers.detection.batches import Batches, BatchPlan, ImageStore
from handlers.detection.card import training_facts
from handlers.detection.data import Sample, fit, read_message
from handlers.detection.devices import (
    check_memory,
    image_store_bytes,
    images_at_once,
    open_device,
    reader_threads,
)
from handlers.detection.errors import DeviceError, StoppedEarly
from handlers.detection.evaluate import average_precision, measurable
from handlers.detection.export import add_facts, export
from handlers.detection.export_check import check_export
from handlers.detection.fine_tune import Build, begin_with, write_weights
from handlers.detection.html_report import Notes, html_report
from handlers.detection.input_size import suited_size
from handlers.detection.job import Event, Job, Note, Snapshot, Started, Trained
from handlers.detection.loop import MIN_IMAGES_FOR_STATISTICS, Learner, iterate
from handlers.detection.measure import find, torch_detect
from handlers.detection.networks import NETWORKS, Network
from handlers.detection.onnx_detector import OnnxDetector
from handlers.detection.pictures.training import training_curve
from handlers.detection.ranks import Ranks
from handlers.detection.report import draw_samples, measure_and_draw
from handlers.detection.reporter import Reporter
from handlers.detection.snapshot import Best, Identity, TrainingState, read_snapshot, write_snapshot
from handlers.detection.suppression import crowded_note
from handlers.detection.training_data import TrainingData, load_data
from schemas.enums import ExpansionDataClass, ModelScopeClass
from schemas.params import ParamClass, check_params
from schemas.result import SkippedImage

#: The validation images are measured so often in a training, evenly, and at snapshots, …
_LOOKS = 10
#: … if at least this many times their number was trained on since the last time; and always at the end. Measuring an
#: image costs about a third of training on it, so that it takes about a sixth of the time at most. A rule of counts,
#: not of seconds: a resumed run must measure at the same iterations.
_TRAINED_PER_VALIDATED = 2
#: Without validation images, so many of the training images are measured at the end.
_MAX_MEASURED_TRAIN_IMAGES = 200
#: Images on which the exported file is held against torch.
_CHECKED_IMAGES = 8
#: Images whose statistics stand in for those of batches that are too small.
_CALIBRATION_IMAGES = 8

Emit = Callable[[Event], None]
Stopping = Callable[[], bool]


def train(job: Job, emit: Emit, stopping: Stopping, ranks: Ranks) -> Trained | None:
    """Train as `job` says, on this rank's device. Rank 0 emits events and returns the result, the others None.

    Raises DataError, LossError, SnapshotError, OutOfMemory, and StoppedEarly once `stopping()` was true in any rank
    and the snapshot is announced.
    """
    if ranks.rank > 0:
        emit = _silent
    emit = notes = Notes(emit)
    params = check_params(job.params)
    recipe = NETWORKS[params.net_model]
    message = read_message(job.message)
    named_size = recipe.input_sizes[params.model_scope]
    input_size = suited_size(named_size, params.model_scope, message)
    if input_size > named_size:
        emit(Note(message=f"the input is {input_size} pixels instead of {named_size}: objects are small"))
    unknown = sum(not (image.width and image.height) for image in message.image_info if image.split != "test")
    if unknown and params.model_scope is not ModelScopeClass.SMALL:
        emit(Note(message=f"{unknown} images have no recorded size: the size of the input was chosen without them"))
    device = open_device(job.devices[ranks.rank])
    store = ImageStore(input_size, image_store_bytes(ranks.size))
    with ThreadPoolExecutor(reader_threads(ranks.size), "reader") as pool:
        # --- data: every image is read once, so that the unreadable are known before the first iteration
        data = load_data(job, message, store, pool, ranks)
        if not data.val:
            none = "no validation images with labels to measure by"
            emit(Note(message=f"{none}: the last averaged weights are kept, measured on training images"))
            if job.patience is not None:
                emit(Note(message=f"{none}: patience has no effect"))
        if note := crowded_note(sample.boxes for sample in data.train + data.val):
            emit(Note(message=note))
        batch_size = _batch_size(params, ranks, emit)
        share = ranks.share(batch_size)
        check_memory(len(share), input_size)
        parts = _parts(job, batch_size, images_at_once(device, input_size, ranks.size), ranks, emit)
        at_once = len(share) // parts

        # --- network: ImageNet weights, those of a version, or the snapshot's
        identity = Identity(
            params.net_model,
            input_size,
            data.class_names,
            data.message.dataset_info.fingerprint,
            params.max_num_iters,
            params.model_name if ":" in params.model_name else None,
        )
        resumed = read_snapshot(job.resume_from, identity) if job.resume_from else None
        # The heads begin at random, alike in every rank.
        torch.manual_seed(job.seed)
        network, origin = recipe.build(len(data.class_names), input_size)
        if job.start_from and resumed is None:
            # The shapes of default boxes too: what was learnt are offsets from them.
            build: Build = lambda classes: recipe.make(classes, input_size, None)  # noqa: E731
            origin = begin_with(job.start_from, params.model_name, network, params.net_model, data.class_names, build)
        elif resumed is None:
            network.fit_boxes(data.object_sizes)
        # Images lie in memory channel by channel last, see Network.normalised; weights that do too save copies.
        network = network.to(device).to(memory_format=torch.channels_last)
        if at_once < MIN_IMAGES_FOR_STATISTICS <= len(share):
            emit(Note(message=f"{at_once} images at once are too few for batch normalisation: it keeps its statistics"))
        if resumed is None and at_once < MIN_IMAGES_FOR_STATISTICS:
            calibrate_batch_norm(network, _stack(data.train, store, input_size, _CALIBRATION_IMAGES).to(device))
        rate = params.inital_learning_rate
        learner = Learner(network, rate, recipe.peak, iterations=params.max_num_iters, images=at_once, ranks=ranks)
        state = resumed or learner.begin(job.seed, origin)
        if resumed:
            learner.resume(resumed)
        first = state.iteration + 1
        emit(Started(device=", ".join(job.devices), initial_weights=state.initial_weights, iteration=state.iteration))
        _stop_if_asked(ranks, stopping, state.iteration)

        # --- iterations
        plan = BatchPlan(state.seed, batch_size, share, parts, operations(params, job.mirror), input_size)
        batches = Batches(plan, data.train, store, network.assigner(), network.predictions)
        reporter = Reporter(emit, params.max_num_iters, batch_size, state.measurements)
        # The snapshot may be of the measurement with which it was over.
        over = resumed is not None and state.unvalidated == 0 and _no_better(job, state, ranks)
        coming = batches.iterate(first, state.iteration if over else params.max_num_iters, pool)
        for iteration, stop in iterate(learner, coming, first, ranks, stopping, reporter.iteration):
            state.iteration = iteration
            state.unvalidated += batch_size
            at_end = iteration == params.max_num_iters
            at_interval = iteration % params.snap_shot_ivterval == 0
            at_look = iteration % max(1, params.max_num_iters // _LOOKS) == 0
            enough = state.unvalidated >= _TRAINED_PER_VALIDATED * len(data.val)
            if data.val and (at_end or ((at_interval or at_look) and enough)):
                state.unvalidated = 0
                _validate(state, learner.average, data, store, pool, ranks, reporter)
                at_end |= _no_better(job, state, ranks)
            if at_interval or at_end or stop:
                learner.save(state)
                if ranks.rank == 0:
                    _announce_snapshot(job.out, identity, state, emit)
            if stop:
                raise StoppedEarly(iteration)
            if at_end:
                break
        if state.iteration < params.max_num_iters:
            emit(
                Note(
                    message=f"ended at iteration {state.iteration} of {params.max_num_iters}: mAP on the validation "
                    f"images has not been better for {job.patience} iterations (patience)"
                )
            )

        # --- export and measurement, by rank 0 alone
        data.skipped.extend(_lost(batches, ranks))
        if ranks.rank > 0:
            return None
        best = state.best or Best(state.iteration, 0.0, learner.average.state_dict())
        learner.average.load_state_dict(best.weights)
        onnx, weights = job.out / "model.onnx", job.out / "weights.pt"
        export(learner.average, data.class_names, onnx)
        write_weights(weights, params.net_model, data.class_names, learner.average.state_dict())
        # Those with labels first: without any there is nothing to measure.
        labelled_first = sorted(data.train, key=lambda sample: not measurable([sample.boxes]))
        measured = data.val or labelled_first[:_MAX_MEASURED_TRAIN_IMAGES]
        on = "val" if data.val else "train"
        check_export(learner.average, onnx, _stack(measured, store, input_size, _CHECKED_IMAGES).numpy())
        detector = _detector(onnx, data.class_names, input_size, job.devices[0], emit)
        found = find(measured, store, pool, detector.detect)
        curve = job.out / "training.png"
        training_curve(reporter.measurements, curve)
        known = found.truths, found.detections, data.class_names
        measurement = measure_and_draw(measured, *known, on, job.out)
        pictures = measurement.pictures | draw_samples(measured, *known, job.out, measurement.thresholds)
        add_facts(onnx, measurement.thresholds, data.fingerprints_of(data.train))
        trained = Trained(
            onnx=onnx,
            sha256=_sha256(onnx),
            weights=weights,
            weights_sha256=_sha256(weights),
            class_names=data.class_names,
            input_size=input_size,
            iterations=state.iteration,
            best_iteration=best.iteration,
            resumed_from_iteration=first - 1 if resumed else None,
            initial_weights=state.initial_weights,
            data_fingerprint=identity.data_fingerprint,
            device=", ".join(job.devices),
            metrics=measurement.metrics,
            leaks=data.leaks(emit),
            images=data.used(),
            reports={curve.name: curve, **pictures},
            card=training_facts(job, data, batch_size, _recipe(job, learner)),
        )
        report = html_report(job, data.message, trained, notes.texts)
        return trained.model_copy(update={"reports": {report.name: report, **trained.reports}})


def _silent(event: Event) -> None:
    """What a rank other than 0 has to say."""


def _batch_size(params: ParamClass, ranks: Ranks, emit: Emit) -> int:
    """Images in an iteration over all ranks."""
    if params.batch_size >= ranks.size:
        return params.batch_size
    emit(Note(message=f"batch_size is {ranks.size} instead of {params.batch_size}: one image for each device"))
    return ranks.size


def _parts(job: Job, batch_size: int, at_once: int, ranks: Ranks, emit: Emit) -> int:
    """How many parts each rank's share of a batch is taken in: as many as have at most `at_once` images, and as many as
    it takes since the whole has run out of device memory.
    """
    if job.batch_size_limit is not None:
        at_once = min(at_once, max(1, job.batch_size_limit // ranks.size))
    most = -(-batch_size // ranks.size)
    parts = -(-most // at_once)
    if parts == 1:
        return 1
    emit(Note(message=f"each batch of {batch_size} images is taken in {parts} parts, to fit into the device's memory"))
    return min(parts, len(ranks.share(batch_size)))


def _stack(samples: Sequence[Sample], store: ImageStore, size: int, count: int) -> torch.Tensor:
    """uint8 [count, size, size, 3]: the first images of `samples`, from the beginning again if they are fewer."""
    images = [store.get(samples[index % len(samples)])[0] for index in range(count)]
    return torch.from_numpy(np.stack([fit(image, size) for image in images]))


def _stop_if_asked(ranks: Ranks, stopping: Stopping, iteration: int) -> None:
    stop, _ = ranks.agree(stopping(), 0.0)
    if stop:
        raise StoppedEarly(iteration)


def _validate(
    state: TrainingState,
    network: Network,
    data: TrainingData,
    store: ImageStore,
    pool: ThreadPoolExecutor,
    ranks: Ranks,
    reporter: Reporter,
) -> None:
    """Measure the averaged weights on the validation images, shared among the ranks; keep them if they are the best."""
    part = find(data.val[ranks.rank :: ranks.size], store, pool, torch_detect(network))
    parts = ranks.gather(part)
    if ranks.rank > 0:
        return
    truths = {image_id: boxes for one in parts for image_id, boxes in one.truths.items()}
    detections = {image_id: found for one in parts for image_id, found in one.detections.items()}
    metrics = average_precision(list(truths), truths, detections, len(data.class_names))
    reporter.measured(state.iteration, metrics)
    # Of equals the later: it has seen more.
    if state.best is None or metrics["map"] >= state.best.map:
        weights = {name: tensor.cpu().clone() for name, tensor in network.state_dict().items()}
        state.best = Best(state.iteration, metrics["map"], weights)


def _no_better(job: Job, state: TrainingState, ranks: Ranks) -> bool:
    """Whether the validation images, just measured, have had no better mAP for as long as the job is patient.

    Not asked of `state.best`, which is the last of equals: a training that finds nothing at all must end too.
    """
    if job.patience is None:
        return False
    measured = [(values["map"], -iteration) for iteration, values in state.measurements if "map" in values]
    # Only rank 0 has any; all learn of it here.
    over, _ = ranks.agree(bool(measured) and state.iteration + max(measured)[1] >= job.patience, 0.0)
    return over


def operations(params: ParamClass, mirror: bool) -> tuple[ExpansionDataClass, ...]:
    """What expands the training images: what is named, and mirroring."""
    return (*params.dataset_expansion_lst, *((ExpansionDataClass.HOR_FLIPE,) if mirror else ()))


def _recipe(job: Job, learner: Learner) -> str:
    """For the card of the model."""
    parts = [learner.recipe, ALWAYS]
    if job.mirror:
        parts.append(MIRRORED)
    if job.patience is not None:
        parts.append(f"To end early once {job.patience} iterations bring no better mAP.")
    return " ".join(parts)


def _announce_snapshot(out: Path, identity: Identity, state: TrainingState, emit: Emit) -> None:
    path = out / f"snapshot-{state.iteration:09d}.pt"
    sha256 = write_snapshot(path, identity, state)
    emit(Snapshot(path=path, iteration=state.iteration, sha256=sha256))


def _lost(batches: Batches, ranks: Ranks) -> list[SkippedImage]:
    """Images that could be read at first and no longer later, in any rank."""
    lost = {name: image for part in ranks.gather(dict(batches.lost)) for name, image in part.items()}
    return [lost[name] for name in sorted(lost)]


def _detector(onnx: Path, class_names: Sequence[str], input_size: int, device: str, emit: Emit) -> OnnxDetector:
    try:
        return OnnxDetector(onnx, class_names, input_size, device)
    except DeviceError as error:
        # The training is done and good; only its measurement takes longer.
        emit(Note(message=f"the exported model is measured on the CPU: {error}"))
        return OnnxDetector(onnx, class_names, input_size, "cpu")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
