"""Short fits under AdaLoRACallback."""

import torch
from lightning.pytorch.callbacks import Callback

from lightning_lora import AdaLoRACallback, LoRAConfig
from lightning_lora.layers import lora_layers
from tests.lit import LitNet, trainer

CONFIG = LoRAConfig(alpha=4, target_modules=["fc1", "fc2"])
PLAN = {"target_rank": 2, "init_rank": 4, "tinit": 2, "tfinal": 3, "deltaT": 2}


def adalora(config=CONFIG, **fields):
    return AdaLoRACallback(config, **{**PLAN, **fields})


def adapters(module):
    return {f"{n}.{part}": p.detach().clone() for n, layer in lora_layers(module) for part, p in layer.lora_parameters().items()}


class Trained(Callback):
    """Keeps the adapters as they are when training ends, before they shrink, and the allocator's state then."""

    def on_train_end(self, trainer, pl_module):
        self.adapters = adapters(pl_module)
        self.state = next(c for c in trainer.callbacks if isinstance(c, AdaLoRACallback)).allocator.state_dict()


def fit(folder, module=None, callback=None, extra=(), ckpt_path=None, **kwargs):
    torch.manual_seed(5)
    module, callback, trained = module or LitNet(), callback or adalora(), Trained()
    run = trainer(folder, callback, trained, *extra, **{"max_epochs": 4, **kwargs})
    run.fit(module, ckpt_path=ckpt_path)
    return run, module, callback, trained
