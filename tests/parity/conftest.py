"""What tests beside PEFT share."""

import pytest


@pytest.fixture(autouse=True)
def no_model_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT saves a model card beside an adapter, which nobody reads here; compiling its template takes longer than the rest."""
    monkeypatch.setattr("peft.PeftModel.create_or_update_model_card", lambda model, folder: None)
