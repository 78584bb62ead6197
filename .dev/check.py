"""fused vs reference on GPU, tiny-ish llama, bf16 + fp32 adapters"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import *
from lightning_lora import kernels

cfg = LlamaConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=1000,
    use_cache=False,
)
torch.manual_seed(0)


def mk(dtype):
    torch.manual_seed(0)
    m = LlamaForCausalLM(cfg).cuda()
    apply_lora(m, config=LoRAConfig(rank=16, target_modules="all-linear", dropout=0.0)).train()
    torch.manual_seed(1)
    for q in get_lora_parameters(m):
        torch.nn.init.normal_(q, std=0.05)
    return m.to(dtype)


ids = torch.randint(0, 1000, (4, 512), device="cuda")


def run(m, autocast=False):
    for q in get_lora_parameters(m):
        q.grad = None
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        l = m(input_ids=ids, labels=ids).loss
    l.backward()
    return l.item(), [q.grad.double().clone() for q in get_lora_parameters(m)]


ref = run(mk(torch.float64))


def err(a):
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a[1], ref[1]))


m = mk(torch.bfloat16)
f = run(m)
print("fused", f[0] - ref[0], err(f))
a = run(m, True)
print("autocast", a[0] - ref[0], err(a))
saved = dict(kernels._RUNS)
kernels._RUNS.clear()
kernels._RUNS[0] = False
p = run(m)
print("plain ops", p[0] - ref[0], err(p))
kernels._RUNS.update(saved)
for b in m.model.layers:
    b.compile()
c = run(m)
print("compiled", c[0] - ref[0], err(c))
run(m)
print(kernels._RUNS, {type(l.mlp).__mro__[1].__name__ for l in m.model.layers}, torch._dynamo.utils.counters["graph_break"])
