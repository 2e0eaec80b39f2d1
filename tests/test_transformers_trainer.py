"""Growing between two trainings of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from growkit import grow
from growkit.checkpoint.hf.auto import GrowkitForCausalLM
from growkit.models.decoder import build
from tests.support import model_config, probe, trained_like

# transformers' loss is in float32, whichever dtype the logits have.
FLOAT32_LOSS = 1e-5
STEPS, ROWS = 4, 2


class Rows(Dataset[dict[str, torch.Tensor]]):
    """A batch for each step, the same whenever it is asked for."""

    def __init__(self, config: Any) -> None:
        self.tokens = probe(config, rows=STEPS * ROWS)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train(model: GrowkitForCausalLM, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        activation_checkpointing=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Rows(model.growkit.config), optimizers=(optimizer, None)).train()


def start() -> tuple[GrowkitForCausalLM, torch.optim.Optimizer]:
    config = model_config("tokenformer")
    model = GrowkitForCausalLM.around(build(config, trained_like(config).params))
    model.config.use_cache = False
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def test_trainer_grow_trainer_is_what_a_plain_loop_makes(tmp_path: Path) -> None:
    sizes = {"num_layers": 3, "mlp_tokens": 20}
    model, optimizer = start()
    train(model, optimizer, tmp_path)
    before = model(probe(model.growkit.config)).logits
    larger, further, report = grow(model, optimizer, **sizes)
    assert type(larger) is GrowkitForCausalLM and report.certificate is not None and report.certificate.exact
    assert larger.config.num_hidden_layers == 3 and larger.config.use_cache is False
    assert larger.gradient_checkpointing, "as the Trainer set it"
    after = larger(probe(model.growkit.config)).logits
    assert float(((after - before).norm() / before.norm()).detach()) <= 1e-10
    train(larger, further, tmp_path)

    plain, steps = start()
    inner = plain.growkit
    for stage in range(2):
        if stage:
            inner, steps, _ = grow(inner, steps, **sizes)
        rows = Rows(inner.config).tokens
        for batch in rows.split(ROWS):
            steps.zero_grad()
            inner(batch[:, :-1], batch[:, 1:]).total.backward()
            steps.step()
    assert [name for name, _ in larger.growkit.named_parameters()] == [name for name, _ in inner.named_parameters()]
    for (name, p), q in zip(larger.growkit.named_parameters(), inner.parameters()):
        assert float(((p - q).norm() / q.norm()).detach()) <= FLOAT32_LOSS, name
    larger.save_pretrained(tmp_path / "saved")
    read = GrowkitForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(read(rows).logits, larger.eval()(rows).logits)
