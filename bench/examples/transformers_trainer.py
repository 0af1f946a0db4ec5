"""SmolLM2-135M: quantised while it is read, LoRA by peftk, transformers' Trainer; then saved, read again, and asked for words."""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peftk
from peftk.cli.models import open_model
from peftk.integrations.transformers import NF4Config

steps, length = (int(argument) for argument in (sys.argv[1:] or (2, 64)))
dense, tokenizer = open_model("smollm2")  # the package holds a GGUF file, for which transformers takes no quantization_config,
folder = tempfile.mkdtemp()  # so it is written as a HF folder once
dense.to(torch.bfloat16).save_pretrained(folder)
del dense


def read() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=NF4Config())


ids = tokenizer(open("bench/data/persuasion.txt").read(), verbose=False).input_ids
data = [{"input_ids": ids[i : i + length], "labels": ids[i : i + length]} for i in range(0, 64 * length, length)]
model = peftk.attach(read(), peftk.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
out = tempfile.mkdtemp()
arguments = TrainingArguments(
    out, max_steps=steps, save_steps=steps, logging_steps=1, per_device_train_batch_size=2, report_to=[]
)
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()  # Trainer(...).train(resume_from_checkpoint=True) goes on exactly from adapters and optimizer
trainer.save_model(f"{out}/adapter")  # HF peft's files

again = peftk.load_adapter(read(), f"{out}/adapter")
prompt = tokenizer("Anne Elliot, with all her claims of", return_tensors="pt").to(again.device)
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=8, do_sample=False)[0]))
