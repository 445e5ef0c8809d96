"""Data sets as folders: reading the COCO and the Pascal VOC layout, one image at a time.

COCO (https://cocodataset.org/#format-data): `annotations.json`, `images/`, and optionally `split.json`, which is
`{split: [file names]}`. Pascal VOC (Everingham et al. 2010): `Annotations/*.xml`, `JPEGImages/`, and
`ImageSets/Main/*.txt`.
"""

import math
import mimetypes
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from xml.parsers import expat

import orjson

#: One VOC file describes one image; a larger one is none.
_MAX_XML_BYTES = 16 * 2**20

#: The lists of VOC that name whole images; the others there (`cat_train.txt`) are about one class.
_VOC_LISTS = ("train", "val", "test")


class DatasetError(Exception):
    """The data set as a whole cannot be read or written; the message says what was expected."""


@dataclass(frozen=True)
class Entry:
    """One image on disk, and its labels as `schemas.records.LabelRecord` has them but for `img_id`.

    `width` and `height` are in pixels; 0 is not given.
    """

    file_name: str
    path: Path
    width: int
    height: int
    split: str | None
    labels: tuple[dict[str, Any], ...]
    #: What is wrong with labels that were left out.
    bad_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bad:
    """Something listed that is no image with labels."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A data set to be read: how many images it lists, and each in turn."""

    total: int
    entries: Iterator[Entry | Bad]
    #: What is wrong with more than single images.
    problems: tuple[str, ...] = ()
    #: Labels that belong to no image that is listed.
    stray_labels: int = 0


def read_split_file(path: Path) -> dict[str, str]:
    """The split of each file name in `{split: [file names]}`. Raises DatasetError, also for a name in two splits."""
    content = _read_json(path, "the split file")
    if not isinstance(content, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in content.values()
    ):
        raise DatasetError(f"{path} is no split file; expected {{split: [file names]}}")
    splits: dict[str, str] = {}
    for split, names in content.items():
        for name in names:
            if splits.setdefault(name, split) != split:
                raise DatasetError(f"{path}: {name!r} is in {splits[name]} and in {split}; expected one split an image")
    return splits


def read_coco(folder: Path, splits: Mapping[str, str], split: str | None = None) -> Source:
    """The data set in a COCO folder; with `split` all of it is in that.

    Raises DatasetError if there is no readable `annotations.json`, and for `splits` of other images.
    """
    path = folder / "annotations.json"
    content = _read_json(path, "COCO annotations")
    try:
        images = list(content["images"])
        classes = {category["id"]: str(category["name"]) for category in content["categories"]}
        by_image: dict[Any, list[dict[str, Any]]] = {}
        for annotation in content.get("annotations", ()):
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{path} is no COCO document ({error!r}); expected images, annotations and categories"
        ) from None
    listed = [image for image in images if isinstance(image, dict)]
    names = {str(image.get("file_name")) for image in listed}
    problems = _unmatched(splits, names.__contains__, path)
    ids = {image.get("id") for image in listed if isinstance(image.get("id"), Hashable)}
    stray = {image_id: len(labels) for image_id, labels in by_image.items() if image_id not in ids}
    if stray:
        problems += (f"{path.name}: labels of images that it does not list, e.g. of image_id {next(iter(stray))!r}",)
    entries = _coco_entries(folder / "images", images, by_image, classes, splits, split)
    return Source(len(images), entries, problems, sum(stray.values()))


def _unmatched(splits: Mapping[str, str], known: Callable[[str], bool], where: Path) -> tuple[str, ...]:
    """What is wrong with names in `splits`. Raises DatasetError if it is all of them: nothing would be in any split,
    and what was meant for tests would be trained on.
    """
    unknown = [name for name in splits if not known(name)]
    if not unknown:
        return ()
    message = f"{len(unknown)} of the {len(splits)} names in the splits are no image of {where}, e.g. {unknown[0]!r}"
    if len(unknown) == len(splits):
        raise DatasetError(f"{message}; expected names as they stand there")
    return (message,)


def _coco_entries(
    root: Path,
    images: list[Any],
    by_image: Mapping[Any, list[dict[str, Any]]],
    classes: Mapping[Any, str],
    splits: Mapping[str, str],
    split: str | None,
) -> Iterator[Entry | Bad]:
    seen: set[str] = set()
    for image in images:
        try:
            name, annotations = image["file_name"], by_image.get(image["id"], [])
            problem = _name_problem(name, seen)
        except (KeyError, TypeError):
            name, annotations, problem = str(image)[:100], [], "expected an image with id and file_name"
        if problem:
            yield Bad(str(name), problem)
            continue
        labels, bad = [], []
        for annotation in annotations:
            category = annotation.get("category_id")
            class_name = classes.get(category) if isinstance(category, int | float | str) else None
            if class_name is None:
                bad.append(f"category {category!r} is not in categories"[:100])
            elif (box := box_of(annotation.get("bbox"))) is None:
                bad.append(f"bbox is {annotation.get('bbox')!r}"[:100])
            else:
                labels.append(
                    {
                        "class_name": class_name,
                        "bbox": box,
                        "difficult": bool(annotation.get("difficult")),
                        "crowd": bool(annotation.get("iscrowd")),
                    }
                )
        yield Entry(
            name,
            root / name,
            _pixels(image.get("width")),
            _pixels(image.get("height")),
            split or splits.get(name),
            tuple(labels),
            tuple(bad),
        )


def read_voc(folder: Path, splits: Mapping[str, str], split: str | None = None) -> Source:
    """The annotated images of a VOC folder; those without an XML file are unlabelled, and left out.

    With `split` all of it is in that. Without it and `splits`, those of ImageSets/Main are used; images that only
    `trainval` lists are for training. Names may have an ending, or none. Raises DatasetError.
    """
    files = sorted((folder / "Annotations").glob("*.xml"))
    if not files:
        raise DatasetError(f"{folder / 'Annotations'} has no XML files; expected a Pascal VOC folder")
    root = folder / "JPEGImages"
    stems = {file.stem for file in files}
    images = _images_by_stem(root)
    if split is None and not splits:
        splits = _voc_splits(folder / "ImageSets" / "Main", stems)

    def known(name: str) -> bool:
        return name in stems or name in images or (name_is_safe(name) and (root / name).is_file())

    return Source(
        len(files), _voc_entries(root, files, stems, images, splits, split), _unmatched(splits, known, folder)
    )


def _images_by_stem(root: Path) -> dict[str, str]:
    """Of two with one stem the first."""
    names = sorted((path.name for path in root.iterdir()), reverse=True) if root.is_dir() else []
    pictures = (name for name in names if (mimetypes.guess_type(name)[0] or "").startswith("image/"))
    return {PurePosixPath(name).stem: name for name in pictures}


def _voc_splits(folder: Path, stems: Set[str]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for list_name in (*_VOC_LISTS, "trainval"):
        path = folder / f"{list_name}.txt"
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            if not line.strip():
                continue
            name = line.split()[0]
            stem = PurePosixPath(name).stem
            if name not in stems and stem in stems:
                name = stem
            if list_name == "trainval":
                splits.setdefault(name, "train")
            elif splits.setdefault(name, list_name) != list_name:
                raise DatasetError(f"{path}: {name!r} is in {splits[name]} too; expected one split an image")
    return splits


def _voc_entries(
    root: Path,
    files: list[Path],
    stems: Set[str],
    images: Mapping[str, str],
    splits: Mapping[str, str],
    split: str | None,
) -> Iterator[Entry | Bad]:
    seen: set[str] = set()
    for file in files:
        try:
            annotation = _parse_xml(file)
        except (OSError, ValueError, expat.ExpatError) as error:
            yield Bad(file.name, f"cannot be read: {error}")
            continue
        name = (annotation.findtext("filename") or "").strip()
        inner = PurePosixPath(name).stem
        if inner != file.stem or not name_is_safe(name) or not (root / name).is_file():
            # Data sets that were renamed or moved keep the old name inside, where it may be another image's by now.
            if file.stem not in images and inner != file.stem and inner in stems:
                yield Bad(file.name, f"there is no image of this name, and {name!r} is that of {inner}.xml")
                continue
            name = images.get(file.stem, name)
        problem = _name_problem(name, seen) if name else "expected a filename"
        if problem:
            yield Bad(file.name, f"filename {name!r}: {problem}")
            continue
        labels, bad = [], []
        for thing in annotation.iterfind("object"):
            class_name = (thing.findtext("name") or "").strip()
            corners = [_decimal(thing.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")]
            if not class_name or None in corners:
                bad.append(f"object {class_name!r} has corners {corners}; expected a name and xmin, ymin, xmax, ymax")
                continue
            x1, y1, x2, y2 = (corner or 0.0 for corner in corners)
            labels.append(
                {
                    "class_name": class_name,
                    "bbox": (x1, y1, x2 - x1, y2 - y1),
                    "difficult": (thing.findtext("difficult") or "").strip() == "1",
                    "crowd": False,
                }
            )
        yield Entry(
            name,
            root / name,
            _pixels(_decimal(annotation.findtext("size/width"))),
            _pixels(_decimal(annotation.findtext("size/height"))),
            split or splits.get(name) or splits.get(file.stem),
            tuple(labels),
            tuple(bad),
        )


def _parse_xml(path: Path) -> ElementTree.Element:
    """The document at `path`. Raises ValueError for one that declares types or entities, or is too large.

    Entities can expand to gigabytes or to other files; an annotation needs none, so a DOCTYPE alone is refused.
    """
    if path.stat().st_size > _MAX_XML_BYTES:
        raise ValueError(f"larger than {_MAX_XML_BYTES} bytes")

    def refuse(*_: Any) -> None:
        raise ValueError("has a DOCTYPE, which may hide entities")

    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(path.read_bytes(), True)
    return builder.close()


def name_is_safe(name: Any) -> bool:
    """Whether `name` is a relative path that stays inside the folder it is joined to."""
    if not isinstance(name, str) or not name or len(name) > 500 or "\\" in name or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def _name_problem(name: Any, seen: set[str]) -> str | None:
    if not name_is_safe(name):
        return "expected a file name inside the folder of images"
    if name in seen:
        return "listed twice"
    seen.add(name)
    return None


def _read_json(path: Path, what: str) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read {what}: {path}: {error}") from None


def box_of(value: Any) -> tuple[float, float, float, float] | None:
    """`value` as x, y, w, h; None if it is not four finite numbers. A box without area is one: readers judge it."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    if not all(isinstance(side, int | float) and not isinstance(side, bool) and math.isfinite(side) for side in value):
        return None
    x, y, w, h = (float(side) for side in value)
    return x, y, w, h


def _decimal(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _pixels(value: Any) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1_000_000
    return int(value) if whole else 0
