"""QLoRA on accelerate's FSDP2: accelerate launch --num_processes 2 bench/examples/with_accelerate.py FOLDER TEXT OUT [STEPS]
Without GPUs accelerate replicates instead: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ..."""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftk

folder, text, out, *steps = sys.argv[1:]
LENGTH = 64
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
torch.manual_seed(0)

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
peftk.qlora(model, peftk.qlora_config(r=16), progress=accelerator.is_main_process)
peftk.nn.constants_as_parameters(model)  # so that they are sharded as the codes are
optimizer = torch.optim.AdamW(peftk.trainable_parameters(model), lr=2e-4, weight_decay=0.0)
ids = AutoTokenizer.from_pretrained(folder)(open(text).read(), return_tensors="pt").input_ids[0]
rows = torch.utils.data.DataLoader(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH), batch_size=4)
model, optimizer, rows = accelerator.prepare(model, optimizer, rows)

model.train()
for step, batch in zip(range(int(steps[0]) if steps else len(rows)), rows, strict=False):
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step}: loss {loss.item():.4f}", flush=True)
if accelerator.is_fsdp2 or accelerator.is_main_process:
    peftk.save_adapter(accelerator.unwrap_model(model), out)  # where it is sharded, gathered by all and written by the first
accelerator.end_training()
