"""A base model whose texts end with another token than its template's turns: trained, it stops after its answer."""

import lightning as L
import pytest
import torch
import transformers

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.data import InstructionDataModule
from lightning_lora.tasks import CausalLMTask
from tests.data import families


@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_trained_model_stops_after_its_answer(tmp_path, template):
    tokenizer = families.tokenizer("qwen3")
    tokenizer.chat_template = None
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text(16 * '{"prompt": "Two and two?", "response": "Four."}\n')

    task = CausalLMTask(str(tmp_path / "model"), learning_rate=1e-2, max_new_tokens=24)
    data = InstructionDataModule(str(file), str(file), predict=str(file), batch_size=8, template=template, cache=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    lora = LoRACallback(LoRAConfig(rank=32, target_modules="all-linear"))
    trainer = L.Trainer(accelerator="cpu", max_epochs=10, callbacks=[lora], **quiet)
    trainer.fit(task, data)
    assert {row["response"] for batch in trainer.predict(task, data) for row in batch} == {"Four."}
