"""``growkit``: every command, its options and its help; what they do is imported when they are called."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from growkit import __version__
from growkit.cli.completion import hardware_names, override_keys, recipe_names
from growkit.errors import ConfigError, GrowkitError

app = typer.Typer(
    help="Train a language model by growing it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Get text ready for training.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Make a tokenizer.", no_args_is_help=True)
recipes_app = typer.Typer(help="The recipes that come with growkit; alone: list them.", invoke_without_command=True)
# Commands by what they are for, in the order of --help.
PLAN, DATA, TRAIN, LOOK = "Write and plan a recipe", "Get data ready", "Train", "Look at runs"
CHECKPOINTS, MACHINE = "Work with checkpoints", "Look at this machine"
app.add_typer(recipes_app, name="recipes", rich_help_panel=PLAN)
app.add_typer(data_app, name="data", rich_help_panel=DATA)
app.add_typer(tokenizer_app, name="tokenizer", rich_help_panel=DATA)

Extends = Annotated[
    Path | None, typer.Option("--extend", help="The run, checkpoint or Hugging Face folder that the stages go on from.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]

UsageError: Any = typer.BadParameter.__mro__[1]  # of everything wrong with a command line; typer exports only this heir


RecipeArgument = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a built-in recipe.", autocompletion=recipe_names)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value on top of the recipe.", show_default=False, autocompletion=override_keys),
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"growkit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Train a language model by growing it."""


@app.command(
    epilog="Example: growkit init mine.yaml --data my.txt --size small --budget '20M tokens'", rich_help_panel=PLAN
)
def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    data: Annotated[str | None, typer.Option(help="Text: a file, a folder, hf:NAME or stdlib.")] = None,
    preset: Annotated[str | None, typer.Option(help="Model family: tokenformer or transformer.")] = None,
    size: Annotated[str | None, typer.Option(help="At the end: tiny, small, medium or large.")] = None,
    budget: Annotated[str | None, typer.Option(help="'20M tokens', '1e15 flops'; default: 20 tokens/param.")] = None,
    stages: Annotated[int | None, typer.Option(help="How many, 1 to 4.")] = None,
    ask: Annotated[bool | None, typer.Option("--ask/--no-ask", help="Ask what is open.")] = None,
) -> None:
    """Write a commented recipe from a few questions or options."""
    from growkit.cli.init import Answers, write_recipe

    write_recipe(file, Answers(data, preset, size, budget, stages), ask=ask)


@app.command(
    epilog="Example: growkit plan quickstart --hardware l4 --png schedule.png",
    rich_help_panel=PLAN,
)
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="h100-sxm, l4, this-machine, ... (default: the recipe's; an unknown name lists all).",
            autocompletion=hardware_names,
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="First time this machine on the recipe's stages.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the schedule into this file.")] = None,
    extend: Extends = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON: bytes, seconds, US dollars, joules.")] = False,
) -> None:
    """Reckon what a recipe costs: parameters, FLOPs, memory, time, price, energy; nothing is trained."""
    from growkit.cli.plan import show_plan

    show_plan(recipe, overrides or [], hardware, extends=extend, measure=measure, png=png, as_json=json)


@app.command(epilog="Example: growkit validate recipes/quickstart.yaml optim.lr=1e-3", rich_help_panel=PLAN)
def validate(recipe: RecipeArgument, overrides: Overrides = None, extend: Extends = None) -> None:
    """Check a recipe and show its stages, without training or importing torch."""
    from growkit.cli.recipes import show_schedule

    show_schedule(recipe, overrides or [], extend)


@app.command(
    epilog="Example: growkit train quickstart data.source=my.txt stages.0.duration='200 steps'", rich_help_panel=TRAIN
)
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Train a recipe from its beginning."""
    from growkit.cli.training import start

    raise typer.Exit(start(recipe, overrides or []))


@app.command(epilog="Example: growkit resume runs/NAME --from 400 --as runs/branch", rich_help_panel=TRAIN)
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    from_step: Annotated[int | None, typer.Option("--from", help="Step to go on from (default: the latest).")] = None,
    as_new: Annotated[Path | None, typer.Option("--as", help="A new run folder; RUN is left untouched.")] = None,
) -> None:
    """Go on with a run that stopped, exactly as if it had not."""
    from growkit.cli.training import go_on

    raise typer.Exit(go_on(run, from_step, as_new))


@app.command(epilog="Example: growkit extend runs/NAME more.yaml run.name=longer", rich_help_panel=TRAIN)
def extend(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="What to go on from; also a Hugging Face folder.")
    ],
    recipe: Annotated[str, typer.Argument(help="A YAML file with further stages, and what shall differ; no model.")],
    overrides: Overrides = None,
    from_step: Annotated[int | None, typer.Option("--from", help="Step of the run (default: the latest).")] = None,
) -> None:
    """Train further stages on a run or a checkpoint, in a new run folder; lineage, moments and counts go on."""
    from growkit.cli.training import extend as extend_checkpoint

    raise typer.Exit(extend_checkpoint(source, recipe, overrides or [], from_step))


@app.command(epilog="Example: growkit report runs/NAME", rich_help_panel=LOOK)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; a run may still be going on.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write. Default: RUN/report.html; for several runs report.html."),
    ] = None,
) -> None:
    """Write one self-contained HTML file about a run, or about several on the same axes."""
    from growkit.cli.reports import show_report

    show_report(runs, output)


@app.command(epilog="Example: growkit compare runs/static runs/grown --by flops --png curves.png", rich_help_panel=LOOK)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the first one is what the others are held to.")],
    by: Annotated[Literal["flops", "tokens", "seconds"], typer.Option(help="Axis the runs are aligned on.")] = "flops",
    png: Annotated[Path | None, typer.Option(help="Also draw the curves into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Set runs side by side: figures, scores at the same place, and what each needs to reach the first one's."""
    from growkit.cli.reports import show_comparison

    show_comparison(runs, by, png, as_json)


@app.command(epilog="Example: growkit lineage runs/NAME", rich_help_panel=LOOK)
def lineage(
    run: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, or a folder of runs.")],
    as_json: AsJson = False,
) -> None:
    """Show where a model comes from: stages, growths with certificates, parents and branches."""
    from growkit.cli.reports import show_lineage

    show_lineage(run, as_json)


@app.command(epilog="Example: growkit sync runs/NAME", rich_help_panel=LOOK)
def sync(run: Annotated[Path, typer.Argument(help="A run folder, of any logger.")]) -> None:
    """Send to Weights & Biases what it lacks of a run."""
    from growkit.cli.sync import sync_run

    sync_run(run)


@app.command(
    epilog="Example: growkit grow runs/NAME num_layers=8 -o grown methods.depth=identity", rich_help_panel=CHECKPOINTS
)
def grow(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run (its latest one) or a Hugging Face folder.")],
    targets: Annotated[list[str], typer.Argument(help="key=value: sizes to grow to, methods.OPERATOR=METHOD.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the grown checkpoint goes.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what is drawn at random.")] = 0,
    data: Annotated[
        str | None, typer.Option(help="Text to measure on: a file, folder or hf:NAME (default: random tokens).")
    ] = None,
    probe_tokens: Annotated[int, typer.Option(min=2, help="Tokens the certificate is measured on.")] = 64,
    kind: Annotated[
        Literal["growkit"] | None, typer.Option("--as", help="A growkit checkpoint, whatever the source is.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of a Hugging Face folder's tensors (default: as they were)."),
    ] = None,
) -> None:
    """Grow a checkpoint or a Hugging Face folder without training, with a certificate."""
    from growkit.cli.growing import grow_checkpoint

    grow_checkpoint(checkpoint, targets, output, seed, probe_tokens, data, as_growkit=kind == "growkit", dtype=dtype)


@app.command(
    epilog="Example: growkit merge runs/ON-A runs/ON-B --ancestor runs/BASE -o both --data a.txt",
    rich_help_panel=CHECKPOINTS,
)
def merge(
    first: Annotated[Path, typer.Argument(help="A checkpoint or run that grew banks of parameter tokens.")],
    second: Annotated[Path, typer.Argument(help="Another one of the same ancestor.")],
    ancestor: Annotated[Path, typer.Option(help="The checkpoint or run that both grew from.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the merged checkpoint goes.")],
    data: Annotated[
        str | None, typer.Option(help="Text to measure on: a file, folder or hf:NAME (default: random tokens).")
    ] = None,
    probe_tokens: Annotated[int, typer.Option(min=2, help="Tokens the certificates are measured on.")] = 64,
) -> None:
    """Lay the banks that two models grew side by side in one."""
    from growkit.cli.growing import merge_checkpoints

    merge_checkpoints(first, second, ancestor, output, data, probe_tokens)


@app.command(epilog="Example: growkit inspect runs/NAME", rich_help_panel=CHECKPOINTS)
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run (its latest one) or a Hugging Face folder.")],
) -> None:
    """Show what a checkpoint holds: model, progress, lineage with certificates; every file is verified."""
    from growkit.cli.checkpoints import inspect_checkpoint

    inspect_checkpoint(checkpoint)


@app.command(epilog="Example: growkit export runs/NAME exported --dtype bfloat16", rich_help_panel=CHECKPOINTS)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run (its latest one), or an exported folder.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    family: Annotated[
        str,
        typer.Option(
            "--as",
            help="Format: growkit (transformers reads it, with growkit), llama, mistral, qwen3, gpt_neox, mamba or "
            "falcon_mamba (transformers alone).",
        ),
    ] = "growkit",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
) -> None:
    """Write a checkpoint as a Hugging Face folder, with its tokenizer."""
    from growkit.cli.export import export_checkpoint

    export_checkpoint(checkpoint, folder, family, dtype)


@app.command(
    epilog="Example: growkit convert pytorch_model.bin -o tokenformer --num-heads 12", rich_help_panel=CHECKPOINTS
)
def convert(
    file: Annotated[Path, typer.Argument(help="The pytorch_model.bin of a published TokenFormer.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the checkpoint goes.")],
    num_heads: Annotated[
        int, typer.Option(help="Attention heads, which the file does not say (150M: 12; larger: 16).")
    ],
) -> None:
    """Make a growkit checkpoint of published TokenFormer weights."""
    from growkit.cli.growing import convert_published

    convert_published(file, output, num_heads)


@app.command("eval", epilog="Example: growkit eval runs/NAME --data my.txt --context 512", rich_help_panel=CHECKPOINTS)
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint or a run folder; for --tasks also a Hugging Face folder.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="Text to score, all of it, or synthetic/TASK (default: what the run held out, or its task)."),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column of a Hugging Face data set.")] = "text",
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a window (default: as trained); again for each further length."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="About how many tokens of a text to score (default: 131072).")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a text's loss by position into this file.")] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Of a synthetic task, at each length (default: 1000).")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="key=value of a synthetic task (default: as trained); again for more.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Instead of a text: tasks of lm-evaluation-harness, TASK,TASK.")
    ] = None,
    tasks_path: Annotated[Path | None, typer.Option(help="A folder with task YAMLs of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task (default: all).")] = None,
    banks: Annotated[
        int | None, typer.Option(min=1, help="With that many banks of parameter tokens, the first ones (default: all).")
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON, a line for each length; of a text with the loss at every position."),
    ] = False,
) -> None:
    """Score a checkpoint on any text: loss, bits per byte, loss by position; sampling speed and memory. Or on tasks."""
    contexts = context or []
    if tasks is not None:
        beside = {"--data": data, "--context": contexts if len(contexts) > 1 else None, "--png": png}
        for option, value in (beside | {"--sequences": sequences, "--setting": setting}).items():
            if value is not None:
                mend = "score the text and the tasks one after the other" if option == "--data" else "leave it out"
                raise ConfigError("bad-command-line", "stands beside --tasks", key=option, value=value, mend=mend)
        from growkit.cli.tasks import evaluate_tasks

        evaluate_tasks(checkpoint, tasks, tasks_path, limit, contexts[0] if contexts else None, as_json=json)
        return
    for option, given in (("--tasks-path", tasks_path), ("--limit", limit)):
        if given is not None:
            mend = "name tasks with --tasks, or leave it out"
            raise ConfigError("bad-command-line", "is for --tasks", key=option, value=str(given), mend=mend)
    from growkit.cli import evaluate as evaluation

    evaluation.evaluate(
        checkpoint,
        data,
        evaluation.TextOptions(text_field, tokens, png),
        evaluation.TaskOptions(sequences, tuple(setting or ())),
        contexts,
        banks=banks,
        as_json=json,
    )


@app.command(epilog="Example: growkit generate runs/NAME --prompt 'def ' --tokens 300", rich_help_panel=CHECKPOINTS)
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint or a run folder.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k most likely; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
) -> None:
    """Write text with a trained model."""
    from growkit.cli.checkpoints import generate_text

    generate_text(checkpoint, prompt, tokens, temperature, top_k, seed)


@app.command(epilog="Example: growkit profile quickstart --stage 3 -o trace.json", rich_help_panel=MACHINE)
def profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    stage: Annotated[int | None, typer.Option(help="Which stage, from 1 (default: the last).")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 10,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the trace goes.")] = Path("trace.json"),
) -> None:
    """Show where a training step's time goes, and how much of the machine it uses; write a trace to open."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is loaded: its profiler talks to the terminal
    from growkit.cli.profile import profile_recipe

    profile_recipe(recipe, overrides or [], stage, steps, output)


@app.command(epilog="Example: growkit doctor", rich_help_panel=MACHINE)
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs would go.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Look at this machine: torch, kernels, GPU, memory, disk, W&B; say what to do about what is missing."""
    from growkit.cli.doctor import examine

    raise typer.Exit(examine(folder, as_json=as_json))


@data_app.command("prepare", epilog="Example: growkit data prepare quickstart data.source=my.txt")
def data_prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that tokenise (default: one a core).")] = None,
) -> None:
    """Read, split and tokenise a recipe's data into the cache, which runs map; go on where it was interrupted."""
    from growkit.cli.data import prepare_data

    prepare_data(recipe, overrides or [], workers)


@tokenizer_app.command("train", epilog="Example: growkit tokenizer train my.txt --vocab-size 512 -o my-tokenizer")
def tokenizer_train(
    source: Annotated[str, typer.Argument(metavar="RECIPE_OR_SOURCE", help="A recipe, or what data.source takes.")],
    vocab_size: Annotated[int, typer.Option(help="Ids of the tokenizer, 257 or more.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="data.KEY=value on top.", show_default=False)] = None,
) -> None:
    """Train a byte-level BPE on the text that is trained on; data.tokenizer=FOLDER uses it."""
    from growkit.cli.data import train_tokenizer

    train_tokenizer(source, overrides or [], vocab_size, output)


@recipes_app.callback(epilog="Example: growkit recipes")
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list", epilog="Example: growkit recipes list")
def recipes_list() -> None:
    """Names of the built-in recipes."""
    from growkit.cli.recipes import list_recipes

    list_recipes()


@recipes_app.command("show", epilog="Example: growkit recipes show quickstart")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a built-in recipe.")]) -> None:
    """Print a built-in recipe."""
    from growkit.cli.recipes import show_recipe

    show_recipe(name)


@recipes_app.command("copy", epilog="Example: growkit recipes copy quickstart copy.yaml")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a built-in recipe.")],
    target: Annotated[Path | None, typer.Argument(help="File to write (default: NAME.yaml here).")] = None,
) -> None:
    """Copy a built-in recipe to change it."""
    from growkit.cli.recipes import copy_recipe

    copy_recipe(name, target)


def main() -> None:
    """Entry point: user errors end in one message and their exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        code = app(prog_name="growkit", standalone_mode=False)
    except UsageError as mistake:
        usage = mistake.ctx.get_usage() if mistake.ctx is not None else "Usage: growkit COMMAND [ARGUMENTS] [OPTIONS]"
        typer.echo(usage, err=True)
        _fail(
            ConfigError(
                "bad-command-line",
                mistake.format_message().replace("Value error, ", "").rstrip(".") or "a command is missing",
                mend="--help says what there is",
            )
        )
    except GrowkitError as error:
        _fail(error)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: GrowkitError) -> NoReturn:
    message = Text.assemble(("error", "bold red"), f": {error}")
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
