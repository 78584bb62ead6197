from lightning_lora.cli import loss_picture
from lightning_lora.cli.loss_picture import draw_loss


def test_a_picture_of_what_was_logged(tmp_path):
    metrics, picture = tmp_path / "metrics.csv", tmp_path / "loss.png"
    for text in ("step,train_loss,val_loss\n0,2.0,\n1,1.0,\n1,,1.5\n", "step,train_loss\n0,-1\n1,nan\n"):
        metrics.write_text(text)
        assert draw_loss(metrics, picture) == str(picture) and picture.read_bytes()[:4] == b"\x89PNG"
        picture.unlink()


def test_no_picture_without_losses_or_matplotlib(tmp_path, monkeypatch):
    metrics, picture = tmp_path / "metrics.csv", tmp_path / "loss.png"
    metrics.write_text("step,lr\n0,1\n")
    assert draw_loss(metrics, picture) is None
    metrics.write_text("step,train_loss\n0,1\n")
    monkeypatch.setattr(loss_picture, "find_spec", lambda name: None)
    assert draw_loss(metrics, picture) is None and not picture.exists()
