"""QLoRA of SmolLM2 with transformers, HF peft and bitsandbytes: of peftk it names only what opens the sample model."""

import tempfile
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peftk.cli.models import open_model

TEXT = Path(__file__).parents[1] / "data" / "persuasion.txt"


def main(steps: int = 5, sequences: int = 4, length: int = 256) -> list[float]:
    source, tokenizer = open_model("smollm2")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = tokenizer(TEXT.read_text()[:20_000], verbose=False).input_ids[: sequences * length]
    ids, losses, start = torch.tensor(ids).view(sequences, length), [], time.perf_counter()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    print(f"losses {losses}, {(time.perf_counter() - start) / steps:.2f} s a step")
    return losses


if __name__ == "__main__":
    main()
