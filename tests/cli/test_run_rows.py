"""The configuration of a run that is not started."""

from lightning_lora.cli.run_rows import RunConfig
from lightning_lora.cli.sweep import digests


def test_trials_share_a_parser_and_nothing_else(config):
    run = ["--config", config]
    own = {
        "first": [],
        "rank": ["--lora.config.rank=3", "--trainer.max_epochs=5"],
        "class": ["--model=lightning_lora.tasks.SequenceClassificationTask", "--model.learning_rate=0.5"],
        "callback": ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
        "logger": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=x"],
    }
    options = {name: [*run, *words] for name, words in own.items()} | {"again": run}
    together = digests(options, "")
    assert together == {name: digests({name: words}, "")[name] for name, words in options.items()}
    assert together["again"] == together["first"] and len(set(together.values())) == len(own)
    first = RunConfig(options["class"])
    assert RunConfig(run, first).config == RunConfig(run).config != first.config
