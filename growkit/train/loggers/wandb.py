"""The process beside a run that sends its metrics log to Weights & Biases.

    python -m growkit.train.loggers.wandb RUN MODE INIT_SECONDS FINISH_SECONDS

It reads RUN/metrics.jsonl as it grows, until standard input ends, which it does too when the run is killed. Standard
output is one note for the user a line; a failure is an exit code and a line on standard error that begins with FAILED.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import sys
from pathlib import Path
from types import TracebackType

import wandb

from growkit.checkpoint import manifest as manifests
from growkit.checkpoint.metrics_log import LogReader
from growkit.checkpoint.run_folder import MARK, RunFolder, step_name
from growkit.config.load import load_recipe
from growkit.models.presets import PRESETS
from growkit.train.loggers.fragment import is_whole
from growkit.train.loggers.heat_map import heat_maps, pixels
from growkit.train.loggers.rows import AXES, COEFFICIENT_COLUMNS, GROWTH_COLUMNS, SAMPLE_COLUMNS, Row, Rows
from growkit.train.loggers.wandb_process import FAILED
from growkit.train.loggers.wandb_state import OFFLINE, WandbState, only_one

POLL_SECONDS = 1.0  # between two looks at the log
NICENESS = 10  # the training's threads go first where there are no more cores than they
GROUPS = ("train", "validation", "optim", "gradients", "speed", "growth", "blocks", "samples")


def main(words: list[str]) -> None:
    path, mode, init_seconds, finish_seconds = words
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which will say when it ends
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    folder = RunFolder(Path(path))
    with _Reported(), only_one(folder.path):
        session = Session(folder, mode, float(init_seconds), float(finish_seconds))
        outcome = session.follow()
        if float(finish_seconds):
            signal.alarm(2 * int(float(finish_seconds)) + 10)  # with no run left to end it, it ends itself
        session.close(outcome)


class _Reported:
    """Says in one line why the process ends; wandb puts a hook of its own in the place of ``sys.excepthook``."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            reason = " ".join(str(error).split())
            print(f"{FAILED}{kind.__name__}: {reason}", file=sys.stderr, flush=True)  # noqa: T201
            os._exit(1)  # wandb's own end would wait for the server once more; wandb-core ends with this process


class Session:
    """One stay of a run in W&B, from a start or resume to the next stop. ``finish_seconds``: what the end waits for the
    server, 0 for as long as it takes."""

    def __init__(self, folder: RunFolder, mode: str, init_seconds: float, finish_seconds: float) -> None:
        self.folder, self.state = folder, WandbState.load(folder.path)
        self.recipe = load_recipe(folder.recipe, [], PRESETS)
        self.rows, self.log = Rows(), LogReader(folder.metrics)
        self.online = has_key() if mode == "auto" else mode == "online"
        if not self.online:
            self._set_aside_unfinished()
            why = "no API key was found" if mode == "auto" else "as logger.mode says"
            _say(f"Weights & Biases: offline, {why}; to send the run: {self._how_to_send()}")
        self.run = self._open(init_seconds, finish_seconds)
        self.held = self.run.starting_step - 1 if self.online else self.state.held
        self.state.online |= self.online
        self.state.save(folder.path)
        for axis in AXES:
            self.run.define_metric(axis, hidden=True)
        for group in GROUPS:
            self.run.define_metric(f"{group}/*", step_metric="tokens")

    def _open(self, init_seconds: float, finish_seconds: float) -> wandb.Run:
        logger, path = self.recipe.logger, self.folder.path
        parent = json.loads((path / MARK).read_text())["parent"]
        return wandb.init(
            project=logger.project,
            entity=logger.entity,
            group=logger.group,
            tags=logger.tags or None,
            name=path.name,
            notes=f"branched from {parent['run']} at step {parent['step']}" if parent else None,
            config=dataclasses.asdict(self.recipe) | {"parent": parent},
            dir=str(path),
            id=self.state.id,
            resume="allow",  # offline too: it makes `wandb sync` put a fragment after what the server holds
            mode="online" if self.online else "offline",
            settings=wandb.Settings(
                init_timeout=init_seconds,
                finish_timeout=finish_seconds,
                finish_timeout_raises=True,
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                x_save_requirements=False,
                x_stats_pid=os.getppid(),
            ),
        )

    def follow(self) -> str:
        """Sends rows and checkpoints until standard input ends; returns what it said."""
        outcome = b""
        while True:
            ready, _, _ = select.select([0], [], [], POLL_SECONDS)
            word = os.read(0, 64) if ready else None
            outcome += word or b""
            for row in self.rows.gather(self.log.new()):
                self._send(row)
            self._send_checkpoints()
            if word == b"":
                return outcome.decode()

    def _send(self, row: Row) -> None:
        if row.step <= self.held:
            return
        values: dict[str, object] = dict(row.values)
        if row.growths is not None:
            values["growth/events"] = wandb.Table(list(GROWTH_COLUMNS), row.growths, allow_mixed_types=True)
        if row.samples is not None:
            values["samples/texts"] = wandb.Table(list(SAMPLE_COLUMNS), row.samples)
        if row.coefficients is not None:
            values["blocks/coefficients"] = wandb.Table(list(COEFFICIENT_COLUMNS), row.coefficients)
            values["blocks/heat_maps"] = wandb.Image(pixels(heat_maps(row.coefficients)), mode="RGBA")
        self.run.log(values, step=row.step, commit=True)
        self.held = row.step

    def _send_checkpoints(self) -> None:
        which = self.recipe.logger.artifacts
        for step in [] if which == "none" else self.folder.steps():
            if step in self.state.artifacts:
                continue
            checkpoint = self.folder.checkpoint(step)
            try:
                manifest = manifests.read(checkpoint, verify=False)
                stages = [entry["step"] for entry in manifest.lineage if entry["kind"] == "stage"]
                if which == "ends" and step not in stages:
                    continue
                before = self.state.artifacts[-1:]
                name = f"checkpoint-{self.state.id}"
                artifact = wandb.Artifact(
                    name,
                    type="checkpoint",
                    metadata={
                        "step": step,
                        "tokens": manifest.progress.tokens,
                        "flops": manifest.progress.flops,
                        "parent": f"{name}:{step_name(before[0])}" if before else None,
                        "lineage": [dict(entry) for entry in manifest.lineage],
                    },
                )
                artifact.add_dir(str(checkpoint))
            except FileNotFoundError:  # no longer kept: a newer one is there
                continue
            self.run.log_artifact(artifact, aliases=["latest", step_name(step)])
            self.state.artifacts.append(step)
            self.state.save(self.folder.path)

    def close(self, outcome: str) -> None:
        """Ends the session. The open row is sent if a checkpoint of its step exists: else a resumed run adds to it."""
        last = self.rows.open
        if last is not None and last.step in self.folder.steps():
            self._send(last)
        self.run.summary.update(self.rows.summary())
        fragment = Path(self.run.dir).parent
        self.run.finish(exit_code=0 if outcome else 1)
        wandb.teardown()
        if not self.online and not all(map(is_whole, fragment.glob("*.wandb"))):
            raise OSError(f"{fragment} is not whole; the disk may be full")
        self.state.held = self.held
        if self.online:
            self.state.online = False
            for file in (self.folder.path / "wandb").glob(f"{OFFLINE}*/*.wandb"):
                file.with_suffix(".wandb.synced").touch()  # the server holds all of it: `wandb sync` is to pass it by
        else:
            self.state.fragments.append(fragment.name)
        self.state.save(self.folder.path)
        if not self.online:
            _say(f"Weights & Biases: to send the run: {self._how_to_send()}")

    def _how_to_send(self) -> str:
        if self.state.online:
            return f"growkit sync {self.folder.path}"
        return self.state.sync_command(self.folder.path)

    def _set_aside_unfinished(self) -> None:
        """What a fragment holds that was never closed is not known; its rows are logged again from the log."""
        for fragment in (self.folder.path / "wandb").glob(f"{OFFLINE}*"):
            if fragment.name not in self.state.fragments:
                fragment.rename(fragment.with_name(f"unfinished-{fragment.name}"))


def has_key() -> bool:
    """Whether wandb finds an API key (environment, netrc, settings) and is not told to stay offline."""
    if os.environ.get("WANDB_MODE", "online") not in ("online", "run"):
        return False
    try:
        return bool(wandb.login(verify=False, prompt=False))
    except wandb.errors.UsageError:  # what it raises where it cannot ask
        return False


def _say(note: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the run was killed: nobody listens, and there is all the more to send
        print(note, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
