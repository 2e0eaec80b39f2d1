"""The recipe: everything a run is, as strict structured configuration. A comment gives a field's unit and range.

``model`` is filled by the dataclass its ``preset`` names (models/presets.py); a stage leaves out what it keeps from the
stage before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

BYTES = "bytes"  # data.tokenizer where a token is a byte
STDLIB = "stdlib"  # data.source where none is named
SYNTHETIC = "synthetic/"  # how data.source begins where it names a task and not a text


@dataclass
class RunConfig:
    name: str | None = None  # folder name of the run; default: the recipe's file name and the time
    folder: str = "runs"  # where runs are kept
    seed: int = 0  # of initialisation, data order, dropout and growth
    threads: int | None = None  # CPU threads; default: PyTorch's


@dataclass
class ScreenConfig:
    """What is dropped before anything is split or tokenised; nothing, unless it says so."""

    min_bytes: int = 0  # shorter documents are dropped
    max_bytes: int | None = None  # longer documents are dropped
    function: str | None = None  # package.module:name, a function of a document's text; False drops it
    languages: list[str] = field(default_factory=list)  # ISO 639 codes to keep: en, de, und (cannot be told); []: all
    deduplicate: str = "none"  # none | exact: of equal documents the first is kept | near: of similar ones too
    across_sources: bool = True  # of a mixture: duplicates of what an earlier source has are dropped too
    near_threshold: float = 0.8  # Jaccard similarity of word 5-grams from which documents are near duplicates, 0.1..1
    permutations: int = 128  # of MinHash, 64..4096: more tell the similarity more exactly, in more time and memory


@dataclass
class SourceConfig:
    source: str = MISSING  # stdlib | a file | a folder | hf:NAME, a Hugging Face data set
    weight: float = 1.0  # share of the training tokens, relative to the other sources', above 0
    pattern: str = "**/*"  # which files of a folder, or of stdlib
    split: str = "train"  # of a Hugging Face data set
    text_field: str = "text"  # column of rows: of JSON lines, Parquet, Arrow, a Hugging Face data set


@dataclass
class SelectConfig:
    """What a step trains on of the data, by their losses. A setting is of one kind alone."""

    kind: str = MISSING  # rho_1: tokens | rho_loss: rows | importance: blocks, drawn by the last loss of each
    reference: str | None = None  # a run, a checkpoint or a Hugging Face folder; of rho_1 and rho_loss
    reference_model: dict[str, Any] = field(default_factory=dict)  # its configuration; growkit writes it
    keep: float | None = None  # share of the tokens that are trained on, above 0, at most 1; default: 0.6; of rho_1
    candidates: int | None = None  # rows that are read for each that is trained on, 2 or more; default: 4; of rho_loss
    smoothing: float | None = None  # share of the draws that is uniform, above 0, at most 1; default: 0.2; importance
    temperature: float | None = None  # draws go by loss^(1/temperature), above 0; default: 1; of importance
    unbiased: bool | None = None  # weigh each row by 1/(N p); default: true; of importance


@dataclass
class BanditConfig:
    """Which source or length each step trains on, chosen by what training on it has taught so far."""

    over: str = MISSING  # sources, of data.mixture | lengths, of every stage whose context has the schedule buckets
    learning_rate: float = 0.01  # η of Exp3.S: how fast choices follow what was learned, above 0
    exploration: float = 0.05  # ε of Exp3.S: share of choices that are left to chance, above 0, at most 1


@dataclass
class DataConfig:
    source: str | None = None  # stdlib | a file | a folder | hf:NAME, of Hugging Face | synthetic/TASK; default: stdlib
    task: dict[str, Any] = field(default_factory=dict)  # settings of a synthetic task, which has none of what follows
    mixture: list[SourceConfig] = field(default_factory=list)  # instead of source: several, each with its weight
    bandit: BanditConfig | None = None  # chooses each step's source, or its length
    pattern: str = "**/*"  # which files of a folder, or of stdlib
    split: str = "train"  # of a Hugging Face data set
    text_field: str = "text"  # column of rows: of JSON lines, Parquet, Arrow, a Hugging Face data set
    streaming: bool = False  # read a Hugging Face data set row by row, without a copy of it on this disk
    cache: str | None = None  # folder of prepared corpora; default: growkit in $XDG_CACHE_HOME or ~/.cache
    tokenizer: str = "bytes"  # bytes | a tokenizer.json | a folder with a tokenizer | NAME on the Hugging Face hub
    end_token: str | None = None  # token between documents; default: the tokenizer's own eos token
    validation_fraction: float = 0.05  # of the bytes, 0..0.5
    shuffle: bool = True  # blocks in a new random order each epoch
    block_tokens: int | None = None  # what is shuffled as one piece; default: the longest context of the stages
    packing: str = "none"  # none: cut anywhere | documents: attention ends with each | best_fit: whole ones | decompose
    screen: ScreenConfig = field(default_factory=ScreenConfig)  # which documents are left out
    workers: int = 0  # processes that make batches; 0: the one that trains
    prefetch: int = 2  # steps that each of those workers makes ahead
    select: SelectConfig | None = None  # what a step trains on, by losses; default: all that it reads


@dataclass
class OptimConfig:
    lr: float = 3e-3  # peak, unless a stage says otherwise
    lr_by: str = "steps"  # what its decay goes by, where steps differ in tokens: steps | tokens; the warm-up: steps
    lr_scale: dict[str, float] = field(default_factory=dict)  # selector: factor, in every stage; a stage's multiply
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices and parameter tokens; never on norms and biases
    decay_embedding: bool = False  # also on embedding and head
    clip_norm: float = 1.0  # of the global gradient; 0 turns clipping off
    z_loss: float = 0.0  # weight of log² Z


@dataclass
class TrainerConfig:
    accelerator: str = "auto"  # auto | cpu | cuda
    strategy: str = "single"  # single | ddp | fsdp
    devices: int = 1  # processes
    precision: str = "auto"  # auto: bf16 where the hardware multiplies it fast, else fp32 | bf16 | fp32
    backend: str = "auto"  # path of the ops: auto | triton | compiled | reference
    compile: bool = False  # torch.compile
    most_graphs: int = 6  # that it may make over the run, one for each length of each stage, 1 or more
    checkpoint_layers: bool = False  # recompute each layer in backward
    loss_chunk_tokens: int = 0  # logits held at once; 0: all
    save_every: str = "200 steps"  # what a crash may cost
    keep_last: int = 2  # checkpoints kept besides the ends of stages
    max_minutes: float | None = None  # stops the run (resumable); never shapes it


@dataclass
class MonitorConfig:
    log_every: int = 10  # steps
    validation_tokens: int = 131072  # read at each validation, spread over the split
    ngram_order: int = 5  # of the n-gram model shown beside; 0: none
    probe_tokens: int = 2048  # read by a growth certificate
    sample_prompt: str = "def "
    sample_tokens: int = 200  # generated at the end of each stage; 0: none
    progress: str = "auto"  # auto: a bar in a terminal, else lines | bar | plain | off
    peak_flops_per_second: float | None = None  # what utilisation is measured against; default: a matmul timed at start


@dataclass
class LoggerConfig:
    kind: str = "none"  # none | wandb | tensorboard | csv, besides metrics.jsonl, which is always written
    project: str = "growkit"  # of Weights & Biases, as all below
    entity: str | None = None  # user or team; default: the account's own
    group: str | None = None  # under which runs are shown together
    tags: list[str] = field(default_factory=list)  # words to find the run by
    mode: str = "auto"  # auto: online with a key, else offline | online | offline
    artifacts: str = "none"  # checkpoints to upload: none | ends (of stages) | all


@dataclass
class HardwareConfig:
    """What ``growkit plan`` reckons with; training does not read it. A figure stands in the preset's place."""

    preset: str | None = None  # h100-sxm, a100-80gb, ... or this-machine; default: this machine, if it was measured
    peak_flops_per_second: float | None = None  # of one device, dense, in the precision of training
    utilisation: float | None = None  # of the peak that training is expected to reach, above 0, at most 1
    memory_gb: float | None = None  # of one device, 10^9 bytes
    price_per_hour: float | None = None  # of one device
    watts: float | None = None  # of one device


@dataclass
class CurriculumConfig:
    """What grows within a stage, up to its context_length. A place is a duration from its start on."""

    schedule: str = MISSING  # linear | root | exponential | discrete | buckets (of context only)
    start: int = MISSING  # tokens, at the first step; of buckets: the shortest
    over: str | None = None  # until it is whole; default: 50%; of linear, root and exponential
    root: float | None = None  # r of root, above zero; default: 2
    at: dict[str, int] = field(default_factory=dict)  # place: tokens from there on, such as {30%: 128}; of discrete
    odds: list[int] = field(default_factory=list)  # of the lengths start, 2 · start, ... up to all; of buckets
    multiple: int = 8  # of which every value is one, tokens


@dataclass
class ContextConfig(CurriculumConfig):
    how: str = "rechunk"  # rows of the next tokens: rechunk | of full rows the beginning: truncate | pieces: reshape
    constant: str = "tokens"  # what a step keeps: tokens (rows follow) | rows
    most_lengths: int = 6  # different ones in the stage, 2..8; each is compiled for itself


@dataclass
class UntilConfig:
    """What may end a stage before its duration: what the losses of its logged steps say."""

    kind: str = MISSING  # plateau: the loss hardly falls | crossing: the next stage's model would fall below it
    window: str | None = None  # of plateau: the span over which losses are averaged, at least monitor.log_every
    least: float | None = None  # of plateau: a fall from window to window below it is none, nats
    patience: int | None = None  # of plateau: windows in a row without a fall; default: 1
    horizon: float | None = None  # of crossing: how far ahead, as a share of the run's FLOPs so far; default: 0.1
    size_scale: float | None = None  # of crossing: A of A · parameters^−α, nats; default: 406.4
    size_power: float | None = None  # of crossing: α; default: 0.34
    data_power: float | None = None  # of crossing: β of B · tokens^−β; default: 0.28


@dataclass
class CandidateConfig:
    """A growth that a stage may choose."""

    name: str = MISSING  # its own in the stage, not none
    grow: dict[str, Any] = MISSING  # as of a stage
    methods: dict[str, str] = field(default_factory=dict)  # as of a stage


@dataclass
class StageConfig:
    name: str = MISSING
    duration: str = MISSING  # '20M tokens', '500 steps', '3e15 flops'; with until, the most
    until: UntilConfig | None = None  # what ends the stage before that; not the last one
    grow: dict[str, Any] = field(default_factory=dict)  # target values of model fields
    methods: dict[str, str] = field(default_factory=dict)  # operator: method, where there are several
    candidates: list[CandidateConfig] = field(default_factory=list)  # instead of grow: the best of them is chosen
    probe: str | None = None  # for which each candidate is trained before that
    probe_least: float = 0.0  # by which the best one has to be better than not growing, nats
    context_length: int | None = None  # tokens
    context: ContextConfig | None = None  # lengths that grow to context_length within the stage, or vary
    window: CurriculumConfig | None = None  # of attention, growing to context_length within the stage
    global_batch_tokens: int | None = None  # per optimizer step, over all processes
    micro_batch_size: int | None = None  # sequences per process and pass; default: as many as the step has
    lr: float | None = None  # peak; default: optim.lr in the first stage, then as before
    schedule: str = "wsd"  # wsd | cosine | constant
    warmup: str | None = None  # from the last rate to the peak; default: 2% in the first stage, then 0%
    decay: str | None = None  # wsd's fall to min_lr_ratio at the end; default: 20% in the last stage, else 0%
    min_lr_ratio: float = 0.0  # where cosine and wsd end, relative to the peak
    new_warmup: str = "0 steps"  # of parameters born in this stage, on top of the schedule
    grow_time: str = "20%"  # over which what methods masked and annealed grow comes in; at least a step
    freeze: list[str] = field(default_factory=list)  # selectors: old, old_entries, embedding, attention.q, bank:0, ...
    lr_scale: dict[str, float] = field(default_factory=dict)  # selector: factor, in this stage
    validate_every: str | None = None  # besides the end of the stage


@dataclass
class StartConfig:
    """Where an extended run begins. ``growkit extend`` writes it; the model is the checkpoint's, so there is no
    ``model`` section beside it."""

    checkpoint: str = ""  # what the run was made from, for the reader
    model: dict[str, Any] = field(default_factory=dict)  # its whole configuration, as its manifest has it
    stage: int = 0  # number of the first stage here, from 0; the source had those before
    step: int = 0  # optimizer steps behind the checkpoint
    tokens: int = 0  # tokens behind it
    flops: float = 0.0  # FLOPs behind it
    lr: float = 0.0  # of its last step, from which the first warm-up goes on
    context_length: int | None = None  # what the first stage inherits, tokens
    global_batch_tokens: int | None = None  # what the first stage inherits, tokens
    new: list[str] = field(default_factory=list)  # parameters grown by hand: new in the first stage
    by_hand: bool = False  # whether the checkpoint was grown since its last step


@dataclass
class Recipe:
    run: RunConfig = field(default_factory=RunConfig)
    start: StartConfig | None = None  # of an extended run
    model: Any = None  # one of the presets' dataclasses; None in an extended run
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    stages: list[StageConfig] = field(default_factory=list)
