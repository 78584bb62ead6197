"""An adapter folder that was overwritten, or nearly so, read by PEFT: the old adapter or the new one, and a user's files beside it."""

import pytest
from torch import nn

from lightning_lora import apply_lora, save_adapter
from lightning_lora.adapter_io import files
from lightning_lora.storage.atomic_files import write_atomic

from .models import DEPRECATED_BY_PEFT, base, close, logits, our_config, randomise, read_by_peft

pytestmark = pytest.mark.filterwarnings(DEPRECATED_BY_PEFT)


def adapted(rank: int, alpha: float) -> nn.Module:
    model = apply_lora(base("llama"), config=our_config(target_modules=["q_proj", "v_proj"], r=rank, lora_alpha=alpha))
    randomise(model, seed=rank)
    return model.eval()


@pytest.mark.parametrize("fails", ["nowhere", "adapter_model.safetensors", "adapter_config.json"])
def test_peft_reads_the_old_adapter_or_the_new_one(tmp_path, monkeypatch, fails):
    """Of another config, so that a mix of the two would load and compute something else."""
    first, second = adapted(2, 4), adapted(2, 32)
    folder = save_adapter(first, tmp_path / "adapter")
    others = {"README.md", "tokenizer.json"}
    for name in others:
        (folder / name).write_text(name)

    def write(path, content):
        if path.name == fails:
            raise OSError(28, "No space left on device")
        write_atomic(path, content)

    monkeypatch.setattr(files, "write_atomic", write)
    if fails == "nowhere":
        save_adapter(second, folder, overwrite=True)
    else:
        with pytest.raises(OSError, match="No space left"):
            save_adapter(second, folder, overwrite=True)
    assert {path.name: path.read_text() for path in folder.iterdir() if path.name in others} == {name: name for name in others}
    assert len(list(folder.iterdir())) == 4
    close(logits(read_by_peft(base("llama"), folder), "llama"), logits(second if fails == "nowhere" else first, "llama"))
