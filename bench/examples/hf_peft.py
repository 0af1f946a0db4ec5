"""HF peft on the real SmolLM2-135M in peftk's 4 bits, the fused op underneath: two steps, save, read again."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import peftk
from peftk.cli.models import open_model

TEXT = Path(__file__).parents[1] / "data" / "persuasion.txt"


def main(length: int = 64) -> dict[str, float]:
    model, tokenizer = open_model("smollm2")
    peftk.quantize_model(model.bfloat16(), progress=False)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    ids = torch.tensor(tokenizer(TEXT.read_text()[:2000]).input_ids)[: 2 * length].view(2, length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = {}
    for step in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[f"step {step}"] = loss.item()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        losses["trained"] = model.eval()(input_ids=ids, labels=ids).loss.item()
        again = PeftModel.from_pretrained(model.unload(), folder).eval()
        losses["read again"] = again(input_ids=ids, labels=ids).loss.item()
    return losses


if __name__ == "__main__":
    print("\n".join(f"{what:<12}{loss:.4f}" for what, loss in main().items()))
