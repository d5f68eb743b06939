"""What lies in a folder: flat images, class folders, image + mask pairs; and telling kinds apart.

Surprising: nothing is guessed where two readings are possible. Images beside class folders, or
folders named like splits, are an error that names `--kind`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from pyarrow import fs

from pipeline import storage
from pipeline.prepare.coco import coco_source
from pipeline.prepare.record_archives import parquet_source, webdataset_source
from pipeline.prepare.records import Source, make_records
from pipeline.prepare.settings import Kind, PrepareConfig, absolute
from pipeline.sources import PARQUET_SUFFIXES, readable_suffixes

SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}
_SPLIT_LIKE = {name for names in SPLIT_FOLDERS.values() for name in names} | {"test", "testing"}
File = tuple[str, int]
"""Path relative to its root, and size in bytes."""


def open_source(config: PrepareConfig) -> Source:
    """Index the source of a preparation.

    Raises:
        ValueError: nothing usable there, or a layout that can be read in two ways.
        FileNotFoundError: a path does not exist.
    """
    if config.masks:
        return _pairs(absolute(config.images), absolute(config.masks), [])
    source = absolute(config.source)
    filesystem, inner = storage.resolve(source)
    info = storage.info_of(filesystem, inner)
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(
            f"source='{config.source}' does not exist; give a folder of images, or a .json, .tar "
            "or .parquet file"
        )
    if info.type == fs.FileType.File:
        return _open_file(config, source)
    files = relative_files(source)
    kind = config.kind if config.kind != "auto" else detect_kind(source, files)
    if kind == "pairs":
        return _ade_layout(source, files, config.split_name)
    if kind == "webdataset":
        return webdataset_source(source, [f for f in files if f[0].lower().endswith(".tar")])
    if kind == "parquet":
        parquet = [f for f in files if f[0].lower().endswith(PARQUET_SUFFIXES)]
        return parquet_source(source, parquet, config.image_column, config.label_column)
    if kind == "coco":
        raise ValueError(
            f"source='{config.source}' is a folder; for COCO give the annotation file and the "
            "images: --source .../instances_train2017.json --images .../train2017"
        )
    return _class_folders(source, files) if kind == "class-folders" else _folder(source, files)


def _open_file(config: PrepareConfig, source: str) -> Source:
    root, name = source.rsplit("/", 1)
    filesystem, inner = storage.resolve(source)
    file = (name, int(storage.info_of(filesystem, inner).size))
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".json":
        if not config.images:
            raise ValueError(
                f"source='{config.source}' is a COCO file; give the folder of its images as well: "
                "--images DIR"
            )
        images = absolute(config.images)
        return coco_source(source, images, dict(relative_files(images)))
    if suffix == ".tar":
        return webdataset_source(root, [file])
    if suffix in PARQUET_SUFFIXES:
        return parquet_source(root, [file], config.image_column, config.label_column)
    way_out = "; unpack it with gunzip first" if suffix in (".gz", ".tgz") else ""
    raise ValueError(
        f"source='{config.source}' is a file of no known kind{way_out}; known are folders, .json "
        "(COCO), .tar (WebDataset) and .parquet"
    )


def relative_files(root: str) -> list[File]:
    """Files below a folder with their sizes, sorted by path.

    Raises:
        FileNotFoundError: no such folder.
    """
    filesystem, inner = storage.resolve(root)
    if storage.info_of(filesystem, inner).type != fs.FileType.Directory:
        raise FileNotFoundError(f"'{root}' is no folder; give one that exists")
    prefix = len(inner.rstrip("/")) + 1
    return [(f.path[prefix:], int(f.size)) for f in storage.list_files(filesystem, inner)]


def detect_kind(root: str, files: list[File]) -> Kind:
    """What a folder is, judged by the names in it.

    Class folders are taken for such only when every image lies exactly one folder deep, in at
    least two folders, none of them named like a split.

    Raises:
        ValueError: it could be more than one kind.
    """
    names = [name for name, _ in files]
    parquet = [name for name in names if name.lower().endswith(PARQUET_SUFFIXES)]
    tars = [name for name in names if name.lower().endswith(".tar")]
    images = [name for name, _ in _images(files)]
    found = [
        (n, k) for n, k in ((parquet, "parquet"), (tars, "webdataset"), (images, "folder")) if n
    ]
    if len(found) > 1:
        seen = ", ".join(f"{len(n)} files for {k} ({n[0]})" for n, k in found)
        raise ValueError(f"source='{root}' is ambiguous: {seen}; say which with --kind")
    if parquet or tars:
        return "parquet" if parquet else "webdataset"
    if _is_ade_layout(images):
        return "pairs"
    return _folder_or_class_folders(root, images)


def _folder_or_class_folders(root: str, images: list[str]) -> Kind:
    folders = sorted({name.split("/")[0] for name in images if "/" in name})
    loose = [name for name in images if "/" not in name]
    ways_out = "pass --kind folder (no labels) or --kind class-folders"
    if _SPLIT_LIKE.intersection(folders):
        raise ValueError(
            f"source='{root}' has images in folders named like splits ({', '.join(folders)}); "
            f"prepare one split at a time, or {ways_out}"
        )
    if any(name.count("/") > 1 for name in images) or len(folders) < 2:
        return "folder"
    if loose:
        raise ValueError(
            f"source='{root}' has {len(folders)} folders that may be classes, but also "
            f"'{loose[0]}' beside them; move it, or {ways_out}"
        )
    return "class-folders"


def _is_ade_layout(images: list[str]) -> bool:
    tops = {name.split("/")[0] for name in images}
    masks = [name for name in images if name.startswith("annotations/")]
    return tops == {"images", "annotations"} and all(n.lower().endswith(".png") for n in masks)


def _images(files: list[File]) -> list[File]:
    readable = readable_suffixes()
    return [f for f in files if PurePosixPath(f[0]).suffix.lower() in readable]


def _require_images(root: str, files: list[File]) -> tuple[list[File], list[str]]:
    """The images among files, and a note of what else is there."""
    images = _images(files)
    if not images:
        raise ValueError(
            f"source='{root}' holds no image among {len(files)} files; give a folder with files "
            "Pillow can read (.jpg, .png, .webp, .tif, ...), .tar or .parquet files"
        )
    taken = {name for name, _ in images}
    others = Counter(PurePosixPath(n).suffix or "no suffix" for n, _ in files if n not in taken)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    return images, [f"ignored, no images: {listed}"] if others else []


def _folder(root: str, files: list[File]) -> Source:
    images, notes = _require_images(root, files)
    depths = {name.count("/") for name, _ in images}
    if max(depths) > 0:
        notes.append("sub-folders were searched; their names are not labels in --kind folder")
    rows = ({"name": name, "path": name, "num_bytes": size} for name, size in images)
    return Source(kind="folder", image_root=root, records=make_records(rows), notes=notes)


def _class_folders(root: str, files: list[File]) -> Source:
    """Folders directly in root are classes, also empty ones (so that splits keep their numbers)."""
    images, notes = _require_images(root, files)
    loose = [name for name, _ in images if "/" not in name]
    if loose:
        raise ValueError(
            f"'{root}/{loose[0]}' lies beside class folders ({len(loose)} such images) and has no "
            "class; move it into one, or read all without labels: --kind folder"
        )
    filesystem, inner = storage.resolve(root)
    entries = storage.list_folder(filesystem, inner)
    names = {e.base_name for e in entries if e.type == fs.FileType.Directory}
    hidden = sorted(name for name in names if name.startswith("."))
    if hidden:
        notes.append(f"hidden folders are no classes and were ignored: {', '.join(hidden)}")
    classes = sorted(names.difference(hidden))
    number = {name: i for i, name in enumerate(classes)}
    labelled = [(name, size, number.get(name.split("/")[0])) for name, size in images]
    rows = [
        {"name": name, "path": name, "num_bytes": size, "label": label}
        for name, size, label in labelled
        if label is not None
    ]
    empty = sorted(set(classes) - {name.split("/")[0] for name, _ in images})
    if empty:
        notes.append(f"classes without an image keep their number: {', '.join(empty[:10])}")
    notes.append("if these folders are no classes, pass --kind folder")
    return Source(
        kind="class-folders",
        image_root=root,
        records=make_records(rows),
        classes=classes,
        notes=notes,
    )


def _ade_layout(root: str, files: list[File], split_name: str) -> Source:
    """images/{training,validation}/*.jpg + annotations/{training,validation}/*.png, one split."""
    tops = {
        name.split("/")[1] for name, _ in files if name.startswith("images/") and "/" in name[7:]
    }
    if not tops:
        return _pairs(f"{root}/images", f"{root}/annotations", [])
    matches = [t for t in SPLIT_FOLDERS.get(split_name, (split_name,)) if t in tops]
    if not matches:
        raise ValueError(
            f"'{root}/images' has no folder for split_name='{split_name}', only "
            f"{', '.join(sorted(tops))}; pass --split-name, or --images DIR --masks DIR"
        )
    folder = matches[0]
    notes = [f"the folder '{folder}' is used; prepare the others with --split-name"]
    return _pairs(f"{root}/images/{folder}", f"{root}/annotations/{folder}", notes)


def _pairs(image_root: str, mask_root: str, notes: list[str]) -> Source:
    """Every image with the mask of the same path but the suffix .png; a missing one is bad."""
    if image_root == mask_root:
        raise ValueError(
            f"images and masks are both '{mask_root}'; give masks a folder of their own"
        )
    images, more_notes = _require_images(image_root, relative_files(image_root))
    masks = {name for name, _ in relative_files(mask_root) if name.lower().endswith(".png")}
    rows = []
    for name, size in images:
        mask = str(PurePosixPath(name).with_suffix(".png"))
        masks.discard(mask)
        rows.append({"name": name, "path": name, "num_bytes": size, "mask_path": mask})
    if masks:
        more_notes.append(f"{len(masks)} masks have no image, such as {min(masks)}")
    return Source(
        kind="pairs",
        image_root=image_root,
        mask_root=mask_root,
        records=make_records(rows),
        notes=notes + more_notes,
    )
