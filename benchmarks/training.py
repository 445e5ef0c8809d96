"""Train on a COCO folder through the child alone, test, and print mAP for each seed. No MongoDB takes part.

    python benchmarks/training.py ../shared/datasets/bccd --seeds 0 1 2

Without a folder it takes that one. The folder has `annotations.json`, `images/` and `split.json`
({split: [file names]}).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from schemas.message import from_coco


def message_of(folder: Path, task_type: str, splits: tuple[str, ...]) -> dict[str, Any]:
    """The request message of those images of `folder` that belong to `splits`."""
    coco = json.loads((folder / "annotations.json").read_text())
    names = json.loads((folder / "split.json").read_text())
    split_of = {name: split for split in splits for name in names[split]}
    categories = {row["id"]: index + 1 for index, row in enumerate(coco["categories"])}
    chosen = [image for image in coco["images"] if image["file_name"] in split_of]
    image_ids = {image["id"]: index + 1 for index, image in enumerate(chosen)}
    images = [
        {
            "id": image_ids[image["id"]],
            "file_name": image["file_name"],
            "width": image["width"],
            "height": image["height"],
            "split": split_of[image["file_name"]],
            "mongodb_id": f"{image['id']:024x}",
        }
        for image in chosen
    ]
    annotations = [
        {
            "id": index + 1,
            "image_id": image_ids[row["image_id"]],
            "category_id": categories[row["category_id"]],
            "bbox": row["bbox"],
            "area": row["bbox"][2] * row["bbox"][3],
            "iscrowd": row.get("iscrowd", 0),
            "mongodb_id": f"{row['id']:024x}",
        }
        for index, row in enumerate(a for a in coco["annotations"] if a["image_id"] in image_ids)
    ]
    counts = {number: sum(row["category_id"] == number for row in annotations) for number in categories.values()}
    info = {
        "task_id": "1",
        "task_type": task_type,
        "dataset": folder.name,
        "created": "2026-01-01T00:00:00Z",
        "image_count": len(images),
        "instance_count": len(annotations),
        "class_count": len(categories),
        "split": splits[0],
        "fingerprint": "0" * 64,
    }
    classes = [
        {"id": categories[row["id"]], "name": row["name"], "instance_count": counts[categories[row["id"]]]}
        for row in coco["categories"]
    ]
    return from_coco({"info": info, "images": images, "annotations": annotations, "categories": classes})


def run_child(folder: Path, work: Path, job: dict[str, Any], message: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The last event of a child that runs `job`, and the seconds it took from its start."""
    work.mkdir(parents=True)
    (work / "message.json").write_text(json.dumps(message))
    lines = [
        json.dumps({"id": i["id"], "path": str(folder / "images" / i["file_name"])}) for i in message["image_info"]
    ]
    (work / "images.jsonl").write_text("\n".join(lines) + "\n")
    paths = {"message": str(work / "message.json"), "images": str(work / "images.jsonl"), "out": str(work / "out")}
    (work / "job.json").write_text(json.dumps({"task_id": "1", "attempt": 1, **paths, **job}))
    begin = time.monotonic()
    child = subprocess.run(
        [sys.executable, "-m", "handlers.detection"],
        input=f"{work / 'job.json'}\n",
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    events = [json.loads(line) for line in child.stdout.splitlines()]
    for event in events:
        if event["event"] not in ("progress", "measured") or "map" in event.get("values", {}):
            print(json.dumps(event)[:400], file=sys.stderr)
    return events[-1], time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("../shared/datasets/bccd"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--expand", nargs="*", default=["HOR_FLIPE", "VER_FLIPE"])
    parser.add_argument("--scope", default="NORMAL")
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--keep", type=Path, help="a new folder to keep everything in")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    if not folder.is_dir():
        sys.exit(f"{folder} is not there; name a COCO folder")
    for seed in chosen.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            work = (chosen.keep or Path(temporary)).resolve() / f"seed{seed}"
            params = {
                "dataset_expansion_lst": chosen.expand,
                "max_num_iters": chosen.iterations,
                "batch_size": chosen.batch_size,
                "snap_shot_ivterval": 100,
                "model_scope": chosen.scope,
            }
            job = {"params": params, "devices": chosen.devices, "seed": seed}
            trained, seconds = run_child(
                folder, work / "train", {"kind": "TRAIN", **job}, message_of(folder, "TRAIN", ("train", "val"))
            )
            if trained["event"] != "trained":
                sys.exit(f"training ended with {trained}")
            model = {key: trained[key] for key in ("onnx", "class_names", "input_size")}
            tested, test_seconds = run_child(
                folder, work / "test", {"kind": "TEST", "model": model, **job}, message_of(folder, "TEST", ("test",))
            )
            metrics = tested["metrics"]
            classes = ", ".join(f"{row['class_name']} {row['map_50']:.3f}" for row in metrics["per_class"])
            print(
                f"seed {seed}: test mAP@.5 {metrics['map_50']:.3f}, mAP {metrics['map']:.3f} ({classes}); "
                f"val mAP@.5 {trained['metrics']['map_50']:.3f}; trained in {seconds:.0f} s, tested in "
                f"{test_seconds:.0f} s ({tested['images_per_second']:.0f} images/s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
