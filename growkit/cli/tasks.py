"""``growkit eval --tasks``: a checkpoint, or a Hugging Face folder, on tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.opening import open_any
from growkit.checkpoint.run_folder import MARK
from growkit.cli.checkpoints import tokenizer_of
from growkit.cli.evaluate import recipe_of, trained_context
from growkit.config.recipe import TrainerConfig
from growkit.eval.tasks import check_tasks, load_folder, score_tasks
from growkit.models.decoder import build
from growkit.train import hardware

console = Console(highlight=False)


def evaluate_tasks(
    folder: Path, tasks: str, tasks_path: Path | None, limit: int | None, context: int | None, *, as_json: bool
) -> None:
    """Prints the scores of the model at ``folder`` on ``tasks``, names with commas between them."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = check_tasks(names, tasks_path)
    device = hardware.accelerator(TrainerConfig())
    ours = any((folder / name).is_file() for name in (MARK, manifests.NAME))
    if not ours and (folder / "config.json").is_file():
        model, tokenizer = load_folder(folder, device)
    else:
        from growkit.checkpoint.hf.auto import GrowkitForCausalLM
        from growkit.checkpoint.hf.tokenizer import as_transformers

        checkpoint = open_any(folder)
        folder, manifest = checkpoint.folder, checkpoint.manifest
        recipe = recipe_of(manifest)
        if context is None and recipe is not None:
            context = trained_context(recipe, manifest)
        params = {key: checkpoint.state.params[key].to(device) for key in checkpoint.state.params}
        model = GrowkitForCausalLM.around(build(manifest.model, params, copy=False))
        tokenizer = as_transformers(tokenizer_of(checkpoint))
    scores = score_tasks(model, tokenizer, names, manager, limit=limit, max_length=context)
    if as_json:
        rows = [dataclasses.asdict(score) for score in scores]
        typer.echo(json.dumps({"checkpoint": str(folder), "limit": limit, "context_length": context, "scores": rows}))
        return
    console.print(str(folder), soft_wrap=True, markup=False)
    table = Table("task", "version", "metric", "value", "± standard error", "documents")
    for score in scores:
        arrow = {True: " ↑", False: " ↓", None: ""}[score.higher_is_better]
        error = "–" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(
            score.task, score.version, score.metric + arrow, f"{score.value:.4f}", error, f"{score.documents:,}"
        )
    console.print(table)
