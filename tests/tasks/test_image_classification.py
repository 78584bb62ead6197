import json
import shutil

import numpy
import pytest
import torch
import transformers as T
from PIL import Image

from lightning_lora import LoRACallback, LoRAConfig, export_merged, load_adapter, save_adapter
from lightning_lora.data import ImageClassificationDataModule
from lightning_lora.data.images import read_image
from lightning_lora.tasks import ImageClassificationTask
from tests import tiny_lm
from tests.tasks import tiny
from tests.tasks.tiny import trainer

COLOURS = {"blue": (0, 0, 250), "green": (0, 200, 0), "red": (250, 0, 0)}
TARGETS = {"vit": ["q_proj", "v_proj"], "resnet": ["convolution"]}


@pytest.fixture(scope="module", params=["vit", "resnet"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder per label, with noisy images of one colour, one of them in grey."""
    root, noise = tmp_path_factory.mktemp("images"), numpy.random.default_rng(0)
    for label, colour in COLOURS.items():
        (root / label).mkdir()
        for i in range(4):
            pixels = numpy.clip(noise.normal(colour, 20, (20, 24, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(kind, folder, images):
    torch.manual_seed(0)
    task = ImageClassificationTask(folder, learning_rate=1e-2)
    config = LoRAConfig(rank=2, target_modules=TARGETS[kind])
    fit = trainer(LoRACallback(config, merge_on_fit_end=False), max_epochs=12, num_sanity_val_steps=0)
    fit.fit(task, ImageClassificationDataModule(str(images), str(images), batch_size=6))
    return task, fit


def predictions(task, images):
    return trainer().predict(task, ImageClassificationDataModule(predict=str(images), batch_size=12))[0]


def test_it_learns_the_folders_names(trained, images):
    task, fit = trained
    assert task.labels == ["blue", "green", "red"] and fit.callback_metrics["val_accuracy"] == fit.callback_metrics["val_f1"] == 1
    found = predictions(task, images)
    assert [(row["image"], row["label"]) for row in found] == [(str(images / k / f"{i}.png"), k) for k in COLOURS for i in range(4)]


def test_saved_loaded_and_exported_it_predicts_the_same(trained, folder, images, tmp_path):
    save_adapter(trained[0], tmp_path / "adapter")
    fresh = ImageClassificationTask(folder, labels=["blue", "green", "red"])
    load_adapter(fresh, tmp_path / "adapter")
    assert predictions(fresh, images) == predictions(trained[0], images)
    export_merged(trained[0], tmp_path / "merged")
    loaded = T.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    pixels = trained[0].processor(images=read_image(str(images / "red" / "0.png")), return_tensors="pt")
    assert loaded.config.id2label[loaded(**pixels).logits.argmax().item()] == "red"


def test_a_table_of_files_and_bfloat16(folder, images, tmp_path):
    (tmp_path / "images").symlink_to(images)
    for name, text in {"rows.csv": "file,kind\nimages/red/0.png,1\nimages/blue/1.png,0\n", "rows.jsonl": None}.items():
        if text is None:
            text = "".join(json.dumps({"file": f"images/{k}/0.png", "kind": i}) + "\n" for i, k in enumerate(COLOURS))
        (tmp_path / name).write_text(text)
        data = ImageClassificationDataModule(val=str(tmp_path / name), columns={"file": "path", "kind": "label"}, batch_size=2)
        (found,) = trainer().validate(ImageClassificationTask(folder, dtype="bfloat16"), data, verbose=False)
        assert {"val_loss", "val_accuracy", "val_f1"} == found.keys()


def test_every_image_is_read_as_colours(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 0)).save(tmp_path / "alpha.png")
    assert [read_image(str(tmp_path / f"{name}.png")).mode for name in ("grey", "alpha")] == ["RGB", "RGB"]


def test_wrong_input_is_named(folder, images, tmp_path):
    def run(source):
        trainer().validate(
            ImageClassificationTask(folder, labels=list(COLOURS)), ImageClassificationDataModule(val=str(source)), verbose=False
        )

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.val='.*empty' has no images"):
        run(tmp_path / "empty")
    shutil.copytree(images, tmp_path / "splits" / "train")
    with pytest.raises(ValueError, match=r"has a folder per split \(train\), not per label; name one of them"):
        run(tmp_path / "splits")
    file = tiny_lm.write(tmp_path / "rows.jsonl", [{"path": "none.png", "label": "red"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: there is no image '.*none.png'; a path is relative to the file"):
        run(file)
    (tmp_path / "none.png").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"none.png is no image, or is damaged"):
        run(file)
