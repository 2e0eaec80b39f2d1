"""A prepared W&B workspace for runs of growkit: what to look at first, over tokens and over FLOPs."""

from __future__ import annotations

from typing import Any, get_args

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from growkit.models.spec import Component

NAME = "growkit"
PARTS = get_args(Component)  # of the model, in which gradients are measured


def layout(entity: str, project: str) -> ws.Workspace:
    """The workspace, not yet saved. Every plot of a quality is there over tokens and over FLOPs; the growth mark stands
    in the same section, on the same axes."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[
            _section(
                "Quality",
                _plot("validation", "tokens", "validation/bits_per_byte", "validation/ngram_bits_per_byte"),
                _plot("validation", "flops", "validation/bits_per_byte", "validation/ngram_bits_per_byte"),
                _plot("training", "tokens", "train/bits_per_byte"),
                _plot("training", "flops", "train/bits_per_byte"),
                _plot("growth marks", "tokens", "growth/mark"),
                _plot("growth marks", "flops", "growth/mark"),
            ),
            _section(
                "Growth",
                _plot("parameters", "tokens", "growth/parameters"),
                _plot("context length", "tokens", "growth/context_length"),
                wr.WeavePanelSummaryTable(table_name="growth/events"),
            ),
            _section(
                "Gradients",
                _plot("norm before clipping", "tokens", "gradients/norm"),
                _plot("norms by component", "tokens", *(f"gradients/norm/{part}" for part in PARTS)),
                _plot("share of new parameters", "tokens", "gradients/new_share"),
                _plot("learning rate", "tokens", "optim/lr"),
            ),
            _section(
                "Speed",
                _plot("tokens per second", "tokens", "speed/tokens_per_second"),
                _plot("FLOP/s", "tokens", "speed/flops_per_second"),
                _plot("utilisation", "tokens", "speed/utilisation"),
                _plot("peak memory, bytes", "tokens", "speed/memory_bytes"),
            ),
            _section(
                "Blocks",
                _plot("nearest two blocks of a stream", "tokens", "blocks/distance"),
                _plot("gradient share of new blocks", "tokens", "gradients/new_block_share"),
                wr.MediaBrowser(title="coefficients", media_keys=["blocks/heat_maps"], num_columns=1),
                wr.WeavePanelSummaryTable(table_name="blocks/coefficients"),
            ),
            _section("Samples", wr.WeavePanelSummaryTable(table_name="samples/texts")),
        ],
        settings=ws.WorkspaceSettings(x_axis="tokens", group_by_prefix="first", point_visualization_method="bucketing"),
    )


def _section(name: str, *panels: Any) -> ws.Section:
    return ws.Section(name=name, panels=list(panels), is_open=True)


def _plot(title: str, axis: str, *metrics: str) -> Any:
    return wr.LinePlot(title=f"{title} over {axis}", x=axis, y=list(metrics))
