"""What a run refuses before it loads a model, and what it keeps of an earlier one in its folder."""

import pytest
import yaml

from lightning_lora.cli.main import main


def test_a_second_fit_in_a_loggers_fixed_folder_keeps_the_first_config(config, tmp_path):
    once = ["fit", "--config", config, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false"]
    with pytest.warns(UserWarning, match="already exists|not empty"):
        assert [main([*once, f"--lora.config.rank={rank}"]) for rank in (3, 4, 5)] == [0, 0, 0]
    names = ("config-before.yaml", "config-before-v1.yaml", "config.yaml")
    assert [yaml.safe_load((tmp_path / "run" / name).read_text())["lora"]["config"]["rank"] for name in names] == [3, 4, 5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.config.init=pisa"], "init='pisa' is not known; there are"),
        (["--lora.config.variant=dara"], "variant='dara' is not known; there are"),
        (["--lora.config.kind_pattern={q_proj: qvk}"], "kind_pattern: kind='qvk' is not known"),
        (["--lora.config.init_options={steps: 3}"], "init_options['steps']=3 is not known"),
        (["--lora.config.r=8"], "no option 'lora.config.r'; PEFT's r is rank here"),
        (["--lora.r=8"], "no option 'lora.r'; PEFT's r is rank here"),
        (["--seed_everything=-1"], "seed_everything=-1: give a whole number from 0 to 4294967295"),
        (["--lora.quantize=nf5"], "quantize='nf5' is not known"),
    ],
    ids=str,
)
def test_unknown_names_are_refused_before_a_model_is_loaded(words, message, config, capsys):
    """There is no such model: to load it would be another error."""
    assert main(["fit", "--config", config, "--model.model=nowhere", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
