"""Images with one label each, for image classification: a folder per label, or a table of files and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from lightning_lora.data.batching import Example
from lightning_lora.data.labels import LabelDataModule
from lightning_lora.data.of_task import of_task
from lightning_lora.data.reading import PlacedRow
from lightning_lora.data.records import LabelledImage, Record
from lightning_lora.data.shown import Part

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"))


class ImageClassificationDataModule(LabelDataModule):
    """Images from a folder with a folder per label, or from rows with ``path`` and ``label`` (extra ``vision``).

    A path is relative to the file with the rows. Images are read when a batch is made, so ``num_workers`` above 0 pays. The model's own
    image processor resizes and normalizes them. The other arguments are those of `FileDataModule`; prediction needs no labels.

    Examples:
        >>> data = ImageClassificationDataModule("images", batch_size=2)
        >>> task = ImageClassificationTask("models/vit")
        >>> L.Trainer(max_epochs=1, callbacks=[LoRACallback()]).fit(task, data)
        >>> next(iter(data.train_dataloader()))["pixel_values"].shape  # (B, channels, height, width)
        torch.Size([2, 3, 32, 32])
    """

    records = (LabelledImage,)

    @property
    def processor(self) -> Any:
        """The task's image processor.

        Raises:
            ValueError: The LightningModule has none.
        """
        return of_task(self, "processor")

    @override
    def read(self, source: str, slot: str, streaming: bool = False) -> Iterable[PlacedRow]:
        path = Path(source)
        if path.is_dir() and not (path / "dataset_info.json").is_file() and not (path / "dataset_dict.json").is_file():
            return images_of(path, slot)
        columns = (self.columns or {}).items()
        names = {"path", *(one for one, other in columns if other == "path"), *(other for one, other in columns if one == "path")}
        rows: list[PlacedRow] = []
        for place, row in super().read(source, slot, streaming):
            files = {name: str(path.parent / row[name]) for name in names & row.keys() if isinstance(row[name], str)}
            rows.append((place, {**row, **files}))
        return rows

    @override
    def _cache_file(self, split: str, content: Any) -> None:
        return None  # paths depend on the place of the file, and there are no tokens to keep

    @override
    def labels_of(self, record: Any) -> Iterable[Any]:
        return [record.label]

    @override
    def encode(self, record: Record, split: str) -> Sequence[Example]:
        assert isinstance(record, LabelledImage)
        if not Path(record.path).is_file():
            raise ValueError(f"there is no image {record.path!r}; a path is relative to the file with the rows")
        return [Example([0], [] if split == "predict" else [self.id_of(record.label)], text=record.path)]

    @override
    def parts(self, example: Example) -> Iterator[Part]:
        yield f"{example.text} ", False
        yield from ((self.name_of_id(label), True) for label in example.labels)

    @override
    def collate(self, examples: Sequence[Example], split: str) -> dict[str, Any]:
        batch = dict(self.processor(images=[read_image(e.text) for e in examples], return_tensors="pt"))
        if split == "predict":
            return {**batch, "files": [e.text for e in examples]}
        return {**batch, "labels": torch.tensor([e.labels[0] for e in examples])}


def read_image(path: str) -> Any:
    """Return an image in RGB.

    Raises:
        ImportError: Pillow is not installed; the message names the extra.
        ValueError: The file is no image, or is damaged.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("images need the package pillow; pip install 'lightning-lora[vision]'") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image, or is damaged ({str(error).splitlines()[0]}); remove it, or write it again") from error


def images_of(folder: Path, slot: str) -> list[PlacedRow]:
    """Return a row for each image in a folder that has a folder per label, or images only.

    Raises:
        ValueError: There is none, or the folders are those of splits.
    """
    files = sorted(path for path in folder.rglob("[!.]*") if path.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"data.{slot}={str(folder)!r} has no images ({', '.join(sorted(ENDINGS))})")
    rows: list[PlacedRow] = []
    for file in files:
        parts = file.relative_to(folder).parts
        rows.append((str(file), {"path": str(file), **({"label": parts[0]} if len(parts) > 1 else {})}))
    labels = {row["label"].lower() for _, row in rows if "label" in row}
    if labels and labels <= SPLITS:
        raise ValueError(
            f"data.{slot}={str(folder)!r} has a folder per split ({', '.join(sorted(labels))}), not per label; name one of them"
        )
    return rows
