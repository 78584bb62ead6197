"""The table of PEFT's own custom-model tests, and what each of its rows says.

The configurations are those of `TEST_CASES` in huggingface/peft, `tests/test_custom_models.py` (Apache-2.0); the models are our own,
small, with layers of the same types under the same names. What a row says:

- `equal`: forward, gradients, merged output and the folder, both ways;
- `grouped`: our update is a kernel of the base's own (grouped) shape, so it merges; PEFT's A sees the channels of all groups, which no such
  kernel does (and it cannot merge). Ours is a special case of PEFT's: PEFT reads our folder, we refuse one of PEFT's by module;
- `grouped DoRA`: the same, but that PEFT takes the norms of a matrix that is not the update's; saving says so;
- `no module: …`: `apply_lora` refuses the module, by its full name and type;
- a field of PEFT's config: a folder with it is refused by that field (it belongs to a later issue: trainable tokens, parameters …).
"""

from peft import KasaConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Toy(nn.Module):
    """Named layers in a row, ReLU between; the input is brought to `shape` first."""

    def __init__(self, shape: tuple[int, ...], /, ids: bool = False, **layers: nn.Module):
        super().__init__()
        self.shape, self.ids, self.names = shape, ids, list(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = (x if self.ids else x.float() / 50).reshape(-1, *self.shape)
        for name in self.names[:-1]:
            x = getattr(self, name)(x).relu()
        return getattr(self, self.names[-1])(x).log_softmax(-1)


class Attends(nn.Module):
    """Self-attention as one layer in a row."""

    def __init__(self, size: int):
        super().__init__()
        self.mha = nn.MultiheadAttention(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


def conv(shape: tuple[int, ...], name: str, layer: nn.Module, features: int) -> Toy:
    return Toy(shape, **{name: layer}, flat=nn.Flatten(), lin0=nn.Linear(features, 2))


MODELS = {
    "MLP": lambda: Toy((10,), lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2)),
    "MLP_LayerNorm": lambda: Toy((10,), layernorm0=nn.LayerNorm(10), lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2)),
    "EmbConv1D": lambda: Toy((10,), True, emb=nn.Embedding(100, 5), conv1d=Conv1D(1, 5), flat=nn.Flatten(), lin0=nn.Linear(10, 2)),
    "Conv1d": lambda: conv((1, 10), "conv1d", nn.Conv1d(1, 1, 2), 9),
    "Conv1dBigger": lambda: conv((9, 10), "conv1d", nn.Conv1d(9, 16, 2), 144),
    "Conv1dKernel1": lambda: conv((3, 10), "conv1d", nn.Conv1d(3, 10, 1), 100),
    "Conv1dGroups": lambda: conv((2, 45), "conv1d", nn.Conv1d(2, 8, 3, groups=2), 344),
    "Conv2d": lambda: conv((5, 3, 3), "conv2d", nn.Conv2d(5, 10, 3), 10),
    "Conv2d2": lambda: conv((10, 3, 3), "conv2d", nn.Conv2d(10, 32, 3), 32),
    "Conv2d1x1": lambda: conv((1, 3, 3), "conv2d", nn.Conv2d(1, 10, 1), 90),
    "Conv2dGroups": lambda: conv((16, 3, 3), "conv2d", nn.Conv2d(16, 16, 3, groups=8), 16),
    "Conv2dGroups2": lambda: conv((2, 3, 3), "conv2d", nn.Conv2d(2, 32, 3, padding=1, groups=2), 288),
    "Conv3d": lambda: conv((5, 3, 3, 3), "conv3d", nn.Conv3d(5, 10, 3), 10),
    "Conv3d1x1": lambda: conv((5, 3, 3, 3), "conv3d", nn.Conv3d(5, 10, 1), 270),
    "MHA": lambda: Toy((10,), attends=Attends(10), lin0=nn.Linear(10, 2)),
    "ConvTranspose": lambda: conv((5, 3, 3), "up", nn.ConvTranspose2d(5, 10, 3), 250),
    "GRU": lambda: Toy((10,), lin0=nn.Linear(10, 20), gru=nn.GRU(20, 20), lin1=nn.Linear(20, 2)),
}


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the output, update included, is multiplied."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


MODELS |= {
    "ScaledEmb": lambda: Toy((10,), True, emb=ScaledEmbedding(100, 5), flat=nn.Flatten(), lin0=nn.Linear(50, 2)),
    "PaddedEmb": lambda: Toy((10,), True, emb=nn.Embedding(100, 5, padding_idx=3), flat=nn.Flatten(), lin0=nn.Linear(50, 2)),
    "ConvSame": lambda: conv((2, 3, 3), "conv2d", nn.Conv2d(2, 8, 3, padding="same"), 72),
    "ConvStride": lambda: conv((1, 6, 6), "conv2d", nn.Conv2d(1, 8, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), 120),
    "Names": lambda: Toy((10,), default=nn.Linear(10, 12), weight=nn.Linear(12, 12), out=nn.Linear(12, 2)),
}

LIN0, LIN01 = {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}
CASES = [
    ("Vanilla MLP 1 LoRA", "MLP", {"target_modules": "lin0"}, "equal"),
    ("Vanilla MLP 2 LoRA", "MLP", LIN0, "equal"),
    ("Vanilla MLP 3 LoRA", "MLP", {"target_modules": ["lin1"]}, "equal"),
    ("Vanilla MLP 4 LoRA", "MLP", LIN01, "equal"),
    ("Vanilla MLP 5 LoRA", "MLP", {**LIN0, "modules_to_save": ["lin1"]}, "equal"),
    ("Vanilla MLP 6 LoRA", "MLP", {**LIN0, "lora_alpha": 4, "lora_dropout": 0.1}, "equal"),
    ("Embedding + transformers Conv1D 1 LoRA", "EmbConv1D", {"target_modules": ["conv1d"], "fan_in_fan_out": True}, "equal"),
    ("Embedding + transformers Conv1D 2 LoRA", "EmbConv1D", {"target_modules": ["emb"]}, "equal"),
    ("Embedding + transformers Conv1D 3 LoRA", "EmbConv1D", {"target_modules": ["emb", "conv1d"], "fan_in_fan_out": True}, "equal"),
    ("Conv1d LoRA", "Conv1d", {"target_modules": ["conv1d"]}, "equal"),
    ("Conv2d 1 LoRA", "Conv2d", {"target_modules": ["conv2d"]}, "equal"),
    ("Conv2d 2 LoRA", "Conv2d", {"target_modules": ["conv2d", "lin0"]}, "equal"),
    ("Conv2d Groups LoRA", "Conv2dGroups", {"target_modules": ["conv2d"]}, "grouped"),
    ("Conv2d Groups2 LoRA", "Conv2dGroups2", {"target_modules": ["conv2d"]}, "grouped"),
    ("Conv3d 1 LoRA", "Conv3d", {"target_modules": ["conv3d"]}, "equal"),
    ("Conv3d 2 LoRA", "Conv3d", {"target_modules": ["conv3d", "lin0"]}, "equal"),
    ("Conv3d 1x1 LoRA", "Conv3d1x1", {"target_modules": ["conv3d"]}, "equal"),
    # The models of the file's other methods, under plain LoRA.
    ("Conv1d bigger", "Conv1dBigger", {"target_modules": ["conv1d", "lin0"]}, "equal"),
    ("Conv1d kernel 1", "Conv1dKernel1", {"target_modules": ["conv1d"]}, "equal"),
    ("Conv1d groups", "Conv1dGroups", {"target_modules": ["conv1d"]}, "grouped"),
    ("Conv2d larger than its linear", "Conv2d2", {"target_modules": ["conv2d", "lin0"]}, "equal"),
    ("Conv2d 1x1", "Conv2d1x1", {"target_modules": ["conv2d"], "r": 4}, "equal"),
    ("MLP beside LayerNorm", "MLP_LayerNorm", {**LIN0, "bias": "all"}, "equal"),
    ("MLP ranks", "MLP", {**LIN01, "r": 4, "rank_pattern": {"lin0": 16}}, "equal"),
    ("MLP ranks and alphas", "MLP", {**LIN01, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin0": 64}, "use_rslora": True}, "equal"),
    ("MLP excluded", "MLP", {**LIN01, "exclude_modules": ["lin1"]}, "equal"),
    ("Embedding that scales its output", "ScaledEmb", {"target_modules": ["emb"]}, "equal"),
    ("Embedding with padding_idx", "PaddedEmb", {"target_modules": ["emb", "lin0"]}, "equal"),
    ("Conv2d padding same", "ConvSame", {"target_modules": ["conv2d"]}, "equal"),
    ("Conv2d stride", "ConvStride", {"target_modules": ["conv2d"]}, "equal"),
    ("Modules named as PEFT names its own", "Names", {"target_modules": ["default", "weight"]}, "equal"),
    # Refused when injected.
    ("MHA 1 LoRA", "MHA", {"target_modules": ["mha"]}, "read"),
    ("MHA 2 LoRA", "MHA", {"target_modules": ["mha", "lin0"]}, "read"),
    ("MHA inside", "MHA", {"target_modules": ["out_proj"]}, "no module: attends.mha.out_proj NonDynamicallyQuantizableLinear"),
    ("LayerNorm", "MLP_LayerNorm", {"target_modules": ["layernorm0"]}, "no module: layernorm0 LayerNorm"),
    ("ConvTranspose", "ConvTranspose", {"target_modules": ["up"]}, "no module: up ConvTranspose2d"),
    ("GRU", "GRU", {"target_modules": ["gru", "lin0"]}, "no module: gru GRU"),
    # Refused when a folder is read.
    ("Vanilla MLP 7 LoRA with DoRA", "MLP", {**LIN0, "use_dora": True}, "equal"),
    ("Vanilla MLP 8 LoRA with DoRA", "MLP", {**LIN01, "use_dora": True}, "equal"),
    ("Vanilla MLP 9 LoRA with DoRA", "MLP", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32}, "equal"),
    (
        "Embedding + transformers Conv1D 1 DoRA",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "use_dora": True, "fan_in_fan_out": True},
        "equal",
    ),
    ("Embedding + transformers Conv1D 2 DoRA", "EmbConv1D", {"target_modules": ["emb"], "use_dora": True}, "equal"),
    (
        "Embedding + transformers Conv1D 3 DoRA",
        "EmbConv1D",
        {"target_modules": ["emb", "conv1d"], "use_dora": True, "fan_in_fan_out": True},
        "equal",
    ),
    ("Conv1d LoRA with DoRA", "Conv1d", {"target_modules": ["conv1d"], "use_dora": True}, "equal"),
    ("Conv2d 1 LoRA with DoRA", "Conv2d", {"target_modules": ["conv2d"], "use_dora": True}, "equal"),
    ("Conv2d 2 LoRA with DoRA", "Conv2d", {"target_modules": ["conv2d", "lin0"], "use_dora": True}, "equal"),
    ("Conv2d Groups LoRA with DoRA", "Conv2dGroups", {"target_modules": ["conv2d"], "use_dora": True}, "grouped DoRA"),
    ("Conv2d Groups2 LoRA with DoRA", "Conv2dGroups2", {"target_modules": ["conv2d"], "use_dora": True}, "grouped DoRA"),
    ("Conv3d 1 LoRA with DoRA", "Conv3d", {"target_modules": ["conv3d"], "use_dora": True}, "equal"),
    ("Conv3d 2 LoRA with DoRA", "Conv3d", {"target_modules": ["conv3d", "lin0"], "use_dora": True}, "equal"),
    ("Conv3d 1x1 LoRA with DoRA", "Conv3d1x1", {"target_modules": ["conv3d"], "use_dora": True}, "equal"),
    ("Vanilla MLP 1 LoRA with KaSA", "MLP", {**LIN0, "kasa_config": KasaConfig(), "r": 4}, "kasa_config"),
    (
        "Vanilla MLP 10 LoRA with VeLoRA random",
        "MLP",
        {**LIN0, "velora_config": VeloraConfig(num_groups=2, init_type="random")},
        "velora_config",
    ),
    (
        "Vanilla MLP 11 LoRA with VeLoRA",
        "MLP",
        {**LIN01, "velora_config": VeloraConfig(num_groups=2, init_type="batch_average")},
        "velora_config",
    ),
    (
        "Vanilla MLP 12 LoRA with VeLoRA",
        "MLP",
        {**LIN0, "velora_config": VeloraConfig(num_groups=2, init_type="batch_average_once")},
        "velora_config",
    ),
    ("Vanilla MLP 1 LoRA with Monteclora", "MLP", {**LIN0, "monteclora_config": MontecloraConfig(num_samples=2)}, "monteclora_config"),
    ("BD-LoRA A only", "MLP", {**LIN01, "use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], match_strict=False)}, "use_bdlora"),
    (
        "BD-LoRA B only",
        "MLP",
        {**LIN01, "use_bdlora": BdLoraConfig(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False)},
        "use_bdlora",
    ),
    ("BD-LoRA both A and B", "MLP", {**LIN01, "use_bdlora": BdLoraConfig(["lin0"], ["lin1"], nblocks=2)}, "use_bdlora"),
    (
        "trainable_tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}, "fan_in_fan_out": True},
        "read",
    ),
    ("Vanilla MLP 1 LoRA with lora_b bias", "MLP", {**LIN01, "lora_bias": True, "lora_alpha": 32}, "equal"),
    ("Conv2d 1 LoRA with lora_b bias", "Conv2d", {"target_modules": ["conv2d"], "lora_bias": True, "lora_alpha": 32}, "equal"),
    ("Conv3d 1 LoRA with lora_b bias", "Conv3d", {"target_modules": ["conv3d"], "lora_bias": True, "lora_alpha": 32}, "equal"),
    ("MLP 1 using nn.Parameter LoRA", "MLP", {"target_parameters": ["lin0.weight"], "target_modules": []}, "read"),
    ("MLP 2 using nn.Parameter LoRA", "MLP", {**LIN0, "target_parameters": ["lin1.weight"]}, "read"),
]
PEFT_CANNOT_MERGE = {"Conv3d1x1"}  # 0.21.2 raises on the kernel's shape; ours has to agree with its own unmerged forward
