"""Token rows beside adapters that start, or are stepped, in their own ways."""

import copy

import pytest
import torch

from lightning_lora import apply_lora, apply_preconditioner, initialize_from_data, load_adapter, lora_param_groups, save_adapter
from tests.model.test_token_rows import IDS, config, filled
from tests.parity.models import llama


@pytest.mark.parametrize(
    "fields",
    [*({"init": name} for name in ("mica", "pissa", "orthogonal", "eva", "lora_ga", "corda")), *({"variant": v} for v in ("dora", "vera"))],
    ids=lambda fields: "-".join(fields.values()),
)
def test_rows_beside_every_way_to_start(fields, tmp_path):
    """They have no A and B, so neither the init nor the variant concerns them."""
    base = llama()
    model = apply_lora(copy.deepcopy(base), config([3, 7], **fields))
    if fields.get("init") in ("eva", "lora_ga", "corda"):
        initialize_from_data(model, [{"input_ids": IDS, "labels": IDS}] * 2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    rows = model.get_input_embeddings().lora_rows
    assert rows.grad[0].any() and not rows.grad[1].any()  # 7 is not in the batch
    wanted = filled(model).eval()(input_ids=IDS).logits
    found = load_adapter(base, save_adapter(model, tmp_path / "adapter")).eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_preconditioning_leaves_rows_alone():
    model = apply_lora(llama(), config([3, 7]))
    plain, found = copy.deepcopy(model), []
    for each, method in ((model, "riemannian"), (plain, None)):
        optimizer = torch.optim.SGD(lora_param_groups(each, lr=0.1))
        if method is not None:
            apply_preconditioner(optimizer, each, method)
        each(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        found.append(each.get_input_embeddings().lora_rows)
    assert torch.equal(*found)
