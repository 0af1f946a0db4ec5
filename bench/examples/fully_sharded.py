"""QLoRA on torch's fully_shard: torchrun --nproc-per-node 2 bench/examples/fully_sharded.py MODEL_FOLDER TEXT_FILE OUT [STEPS]"""

import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftk

folder, text, out, *steps = sys.argv[1:]
on_gpu, LENGTH = torch.cuda.is_available(), 64
distributed.init_process_group("nccl" if on_gpu else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
rank, ranks = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
peftk.qlora(model, peftk.qlora_config(r=16), progress=rank == 0)
peftk.nn.constants_as_parameters(model)  # so that they are sharded as the codes are
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer, mp_policy=policy)
fully_shard(model, mp_policy=policy)
optimizer = peftk.optim.AdamW(peftk.trainable_parameters(model), lr=2e-4, weight_decay=0.0)

ids = AutoTokenizer.from_pretrained(folder)(open(text).read(), return_tensors="pt").input_ids[0]
rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[rank::ranks].to(device)
for step in range(int(steps[0]) if steps else len(rows) // 4):
    batch = rows[4 * step : 4 * step + 4]
    loss = model.train()(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}, process {rank}: loss {loss.item():.4f}", flush=True) if rank == 0 else None
peftk.save_adapter(model, out)  # gathered by all, written by the first
distributed.barrier()
