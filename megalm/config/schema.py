"""The run's configuration: what each section of RUN.toml may hold.

Plugins own their settings: ``train.objective = "mlm"`` chooses one, ``[objective.mlm]`` configures it, and the plugin's
own model validates that table. The same holds for optimizers, lr_schedules, data_sources, pipeline_schedules and
callbacks.
``[model]`` starts from the defaults of ``model.architecture`` (a plugin record), which any key given here overrides.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from megalm.config.settings import Settings


def _folder(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("expected the name of a folder, not empty and without NUL characters")
    return text


Folder = Annotated[str, AfterValidator(_folder)]
Size = Annotated[int, Field(ge=1, le=1 << 26)]
"""Of a tensor's dimension: a slip of the keyboard is refused here, and not by the allocator or after hours."""
Precision = Literal["float32", "bfloat16", "float64"]


class RunConfig(Settings):
    """Where the run lives and what seeds it."""

    dir: Folder
    """Folder of the run: configuration, metrics, checkpoints, summary and report. Relative to the working directory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seeds every draw of the run by address: initial weights, sample order, masking, dropout."""
    allow_changed_config: bool = False
    """Go on in a run folder that was started with another configuration."""


class LaunchConfig(Settings):
    """How the processes run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA (with NCCL) where it is available, else the CPU (with gloo)."""
    threads: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """CPU threads a rank. ``auto`` divides the cores among this host's ranks. Equal hashes need equal threads."""
    collective_timeout: float = Field(default=600.0, gt=0)
    """Seconds after which a collective that has not completed ends the job."""


class ParallelConfig(Settings):
    """The layout: how many ranks share each axis."""

    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    sp: bool = False
    """Megatron's sequence parallelism: norm and dropout regions are sharded over tokens on the tensor-parallel axis."""
    pp: int = Field(default=1, ge=1)
    """Pipeline-parallel ranks: each has some of the layers."""
    pp_schedule: str = "1f1b"
    """Component of kind ``pipeline_schedules``: who computes what in which order (``megalm schedule`` draws them);
    settings in ``[pipeline_schedule.NAME]``."""
    pp_virtual: int | None = Field(default=None, ge=1)
    """Stages of a pipeline rank; default: as the schedule has them."""
    pp_split: list[Size] | None = None
    """Layers of each stage; default: cut so that the slowest is as fast as can be."""
    dp: int | None = Field(default=None, ge=1)
    """Data-parallel ranks. Default: all that ``tp`` and ``pp`` leave."""


class KernelsConfig(Settings):
    """What each operation is computed by: ``auto``, ``cuda``, ``cpu`` (megalm's own), ``torch``, ``reference``, or a
    component of kind ``kernels``. ``auto`` takes the first of these that serves and never a plugin's."""

    rms_norm: str = "auto"
    """Root-mean-square normalisation, with or without the residual addition before it."""
    layer_norm: str = "auto"
    """Layer normalisation, with or without the residual addition before it."""
    activation: str = "auto"
    """The MLP's activation, gated or not."""
    rope: str = "auto"
    """Rotary position embedding."""
    softmax: str = "auto"
    """The softmax of attention whose probabilities are dropped; other attention is torch's."""
    dropout: str = "auto"
    """Dropout by address, with or without the residual addition after it."""
    cross_entropy: str = "auto"
    """What the loss over the vocabulary does to each logit, around matrix products that are torch's."""
    multi_tensor: str = "auto"
    """Passes over lists of tensors: the squares that make the gradient's norm."""


class ModelConfig(Settings):
    """One transformer backbone; ``architecture`` names the defaults (gpt2, llama, bert, or a plugin's)."""

    architecture: str
    """Component of kind ``architectures`` that supplies the defaults of this section."""
    layers: int = Field(ge=1, le=10_000)
    """Transformer layers."""
    hidden_size: Size
    """Width of the residual stream."""
    heads: Size
    """Query heads."""
    kv_heads: Size | None = None
    """Key and value heads (grouped-query attention); default: as many as ``heads``, which they must divide."""
    head_dim: Size | None = None
    """Features of a head; default: hidden_size / heads."""
    ffn_size: Size | None = None
    """Inner width of the MLP; default: 4 * hidden_size, or for a gated MLP 8/3 * hidden_size rounded up to 64."""
    vocab_size: int | None = Field(default=None, ge=2, le=1 << 26)
    """Rows of the embedding; default and least: the tokenizer's vocabulary."""
    max_positions: Size | None = None
    """Rows of the learned position embedding; default and least: train.sequence_length. With other positions it says
    only how long a text the model is for."""
    position_offset: int = Field(default=0, ge=0, le=1 << 26)
    """Row of the learned position embedding that the first position has (RoBERTa: 2)."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Kind of normalisation."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance inside the normalisation."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Before each block (GPT) or after each residual addition (BERT)."""
    embedding_norm: bool = False
    """Normalise the sum of the embeddings (BERT)."""
    final_norm: bool = True
    """Normalise after the last layer."""
    position: Literal["learned", "rope", "none"] = "learned"
    """How positions enter."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """How rotary frequencies were stretched for longer texts: all divided by ``rope_factor``, or as LLaMA 3.1 does the
    low ones only."""
    rope_factor: float = Field(default=1.0, gt=0)
    """How many times longer."""
    rope_low_frequency_factor: float = Field(default=1.0, gt=0)
    """``llama3``: waves longer than ``rope_original_positions`` divided by this are stretched in full."""
    rope_high_frequency_factor: float = Field(default=4.0, gt=0)
    """``llama3``: waves shorter than ``rope_original_positions`` divided by this are left alone."""
    rope_original_positions: Size | None = None
    """``llama3``: the text length before stretching."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys before positions enter (Qwen3)."""
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    """Non-linearity of the MLP and of the MLM transform."""
    gated: bool = False
    """Gated MLP: activation(gate) * up (SwiGLU with silu, GeGLU with gelu)."""
    qkv_bias: bool = True
    """Bias of the query, key and value projections."""
    attention_bias: bool = True
    """Bias of the attention's output projection."""
    mlp_bias: bool = True
    """Bias of the MLP's projections."""
    tie_embeddings: bool = True
    """The language-modelling head uses the token embedding's matrix."""
    token_types: int = Field(default=0, ge=0, le=1 << 26)
    """Rows of the token-type (segment) embedding; at least what the objective needs."""
    lm_head_transform: bool = False
    """Dense, activation and norm before the language-modelling head (BERT)."""
    lm_head_bias: bool = False
    """Bias of the language-modelling head, a value for each vocabulary row."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after the embeddings and after each block, drawn by address."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on attention probabilities, drawn by address; above 0 the reference attention is used."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""
    scaled_init: bool = True
    """Divide init_std of the projections that write to the residual stream by sqrt(2 * layers) (GPT-2)."""


class BlendEntry(Settings):
    """One folder of a blend."""

    path: Folder
    """Folder written by ``megalm data prepare``."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the samples, in proportion to the others' weights. Without weights each counts by its samples."""
    epochs: int = Field(default=1, ge=0)
    """How often its samples may be seen; a run that needs more is refused. 0: as often as it takes (upsampling)."""


class RecordsConfig(Settings):
    """Labelled records for a head: files of TSV, CSV, JSONL, CoNLL or SQuAD-like JSON."""

    train: list[Folder] = Field(min_length=1)
    """Files to train on. The labels that occur in them are the head's."""
    validation: list[Folder] = Field(default_factory=list)
    """Files to evaluate on; default: a share of ``train``, or what ``validation_only`` says."""
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the records of ``train`` that is held out where nothing else says what to evaluate on."""
    only: dict[str, str] = Field(default_factory=dict)
    """Which rows to train on, by column and value: ``{split = "train"}``."""
    validation_only: dict[str, str] = Field(default_factory=dict)
    """The same for evaluation."""
    format: Literal["tsv", "csv", "jsonl", "conll", "squad"] | None = None
    """Default: what each file's name tells."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Where a field of the head is that files call otherwise: ``{text = "sentence"}``, or by number from 1."""
    header: bool | None = None
    """Of tables: whether the first row names the columns; default: unless columns are given by number."""
    length_window: int = Field(default=50, ge=1)
    """Steps whose records are sorted by length, so that a step's are of like length and little is padded; 1: the steps
    of the shuffled order."""
    tokenizer: Folder | None = None
    """As ``megalm data prepare --tokenizer`` takes it; default: that of the checkpoint to start from."""


class DataConfig(Settings):
    """What to train and evaluate on."""

    records: RecordsConfig | None = None
    """Labelled records instead of stores, for ``train.head``."""

    blend: list[BlendEntry] = Field(default_factory=list)
    """Several folders instead of ``path``, each with its share of the samples. After every sample each has had its
    share to within one. Evaluation blends the validation parts alike."""
    path: Folder | None = Field(default=None, validate_default=True)
    """Folder written by ``megalm data prepare``; its train and validation parts are used. Needed without ``blend``."""
    source: str | None = None
    """Component of kind ``data_sources`` to train on instead of the train part of ``path``, which gives the tokenizer
    and is evaluated on; settings in ``[data_source.NAME]``."""
    block: int = Field(default=1 << 20, ge=1)
    """Tokens of a stream that are held, and within which samples are shuffled."""
    sentences: bool = False
    """Split a stream's documents into sentences, for objectives that pair them."""
    epochs: int = Field(default=0, ge=0)
    """How often the samples of ``path``, or the stream, may be seen; a run that needs more is refused, or ends with the
    stream. 0: as often as it takes."""
    packing: bool = False
    """Fill rows with whole documents as far as they go in, and keep the documents of a row apart: none attends to
    another, positions begin anew. For objectives that can (causal_lm, mlm)."""
    packing_window: int = Field(default=32, ge=1, le=1 << 16)
    """Rows that are packed together: more of them cut fewer documents, and each sample takes longer to find."""
    workers: int = Field(default=1, ge=0, le=64)
    """Threads that build rows ahead of their use; 0: none. They change no row."""

    @field_validator("path")
    @classmethod
    def _either(cls, path: str | None, info: ValidationInfo) -> str | None:
        blend = info.data.get("blend")
        if info.data.get("records") is not None:
            if path is not None or blend:
                raise ValueError("a store and data.records exclude each other; a head trains on records")
            return None
        if path is None and blend == [] and "records" in info.data:
            raise ValueError("names no store; add path (text), or several as blend, under [data]")
        if path is not None and blend:
            raise ValueError("one store and data.blend exclude each other; put it into data.blend with a weight")
        return path

    @model_validator(mode="after")
    def _blend(self) -> DataConfig:
        if self.blend and self.source is not None:
            raise ValueError("data.source and data.blend exclude each other; name one store as path")
        if self.blend and self.epochs:
            raise ValueError("epochs is for data.path; each table of data.blend has an epochs of its own")
        if len({entry.weight is None for entry in self.blend}) > 1:
            raise ValueError("blend: give all a weight, or none (then each counts by its samples)")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """The folders of stores, one or several; none of a run on records."""
        return tuple(entry.path for entry in self.blend) if self.path is None else (self.path,)


class AdversarialConfig(Settings):
    """Adversarial training: also train on token embeddings that are changed, a little, for the worse."""

    method: Literal["fgm", "freelb"]
    """``fgm``: the loss as it is, and that of vectors moved by ``epsilon`` along its gradient: two passes. ``freelb``:
    the mean loss of ``steps`` passes, that begin with noise and climb from one to the next."""
    epsilon: float = Field(gt=0)
    """Size of a row's perturbation: what it has with ``fgm``, the most that it comes to with ``freelb``."""
    norm: Literal["l2", "linf"] = "l2"
    """What sizes of rows and of their gradients are: the root of the sum of squares, or the largest value."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """``freelb``: passes over a step's rows; default: 3."""
    step_size: float | None = Field(default=None, gt=0)
    """``freelb``: how far a row's perturbation moves between two passes, in the norm; needed there."""
    init_magnitude: float | None = Field(default=None, ge=0)
    """``freelb``: the noise is uniform within this, and with ``l2`` divided by the root of the number of a row's
    values; default: ``epsilon``."""

    @property
    def passes(self) -> int:
        """How often a step takes its rows."""
        return 2 if self.method == "fgm" else self.steps or 3

    @model_validator(mode="after")
    def _of_the_method(self) -> AdversarialConfig:
        given = [name for name in ("steps", "step_size", "init_magnitude") if getattr(self, name) is not None]
        if self.method == "fgm" and given:
            raise ValueError(f'{given[0]} is for method = "freelb"; leave it out')
        if self.method == "freelb" and self.step_size is None:
            raise ValueError("freelb needs step_size: how far a perturbation moves between two passes (epsilon, say)")
        return self


class MixEntry(Settings):
    """One of several objectives of which each cell has one."""

    name: str
    """Component of kind ``objectives``, or ``a+b`` for a joint objective."""
    share: float = Field(gt=0)
    """Its share of the cells, in proportion to the others' shares."""


class TrainConfig(Settings):
    """The training loop."""

    head: str | None = None
    """Component of kind ``heads`` to train on ``data.records`` instead of an objective; settings in ``[head.NAME]``."""
    objective: str | list[MixEntry] | None = Field(default=None, validate_default=True)
    """Component of kind ``objectives``; ``a+b`` trains both on shared examples, and a list of tables with ``name`` and
    ``share`` gives each cell one of them. Needed without ``head``."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    sequence_length: int = Field(ge=2, le=1 << 26)
    """Tokens of a row."""
    global_batch: Size
    """Rows of a step over all ranks; accumulation is derived: global_batch / (micro_batch * dp)."""
    micro_batch: Size
    """Rows of one forward and backward on one data-parallel rank."""
    cell: Size | None = None
    """Rows that belong together: consecutive slots, independent of the layout. It divides global_batch. Needed by
    objectives that couple rows (contrastive pools), where it equals micro_batch * dp, and by mixed objectives, where
    micro_batch * dp divides it; not for others."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    optimizer: str = "adamw"
    """Component of kind ``optimizers``; settings in ``[optimizer.NAME]``."""
    lr_schedule: str = "cosine"
    """Component of kind ``lr_schedules``; settings in ``[lr_schedule.NAME]``."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""
    recompute: Literal["none", "full"] = "none"
    """``full`` keeps each layer's input alone for backward and computes the rest again: less memory, more work."""
    precision: Precision = "float32"
    """Type of weights in forward and backward. bfloat16 keeps float32 master weights and gradients."""
    adversarial: AdversarialConfig | None = None
    """Train against small changes of the token embeddings, whatever is trained. Default: not."""

    @field_validator("objective")
    @classmethod
    def _something(
        cls, objective: str | list[MixEntry] | None, info: ValidationInfo
    ) -> str | list[MixEntry] | None:
        head = info.data.get("head")
        if objective is None and head is None and "head" in info.data:
            raise ValueError("names nothing to train; add objective (text), or head, under [train]")
        if objective is not None and head is not None:
            raise ValueError("a head is trained instead of an objective; leave train.objective or train.head out")
        if isinstance(objective, list) and len(objective) < 2:
            raise ValueError('mixes at least two objectives, as [{name = "a", share = 0.7}, {name = "b", share = 0.3}]')
        return objective

    @property
    def what(self) -> str:
        """The objective or the head, as it is named."""
        if isinstance(self.objective, list):
            return "a mix of " + " and ".join(entry.name for entry in self.objective)
        return self.objective or self.head or ""


LoraTarget = Literal["q", "k", "v", "out", "gate", "up", "down"]


class FinetuneConfig(Settings):
    """Training on from a model that exists: which of its parameters move, and which of its checkpoints is kept.

    With a method, a fresh run takes only weights from ``checkpoint.load``, whatever objective they were trained with:
    step, optimizer and data begin anew, and what the checkpoint lacks (a head, say) gets its initial values.
    """

    method: Literal["none", "full", "frozen", "lora", "adapter"] = "none"
    """``full``: everything trains. ``frozen``: the backbone, or its beginning, does not. ``lora``: only low-rank
    products beside the weights, and heads. ``adapter``: only small networks after each block, and heads. ``none``: no
    fine-tuning."""
    frozen_layers: int | None = Field(default=None, ge=0)
    """``frozen``: the embeddings and so many of the first layers; default: the whole backbone."""
    lora_rank: Size = 8
    """``lora``: inner size of the products."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """``lora``: the products are multiplied by lora_alpha / lora_rank."""
    lora_targets: list[LoraTarget] = Field(default=["q", "v"], min_length=1)
    """``lora``: which projections of attention (q, k, v, out) and of the MLP (gate, up, down) get a product."""
    adapter_size: Size = 64
    """``adapter``: inner width."""
    also_train: list[str] = Field(default_factory=list)
    """Parameters that train besides, by patterns of names: ``backbone.final_norm.*``, ``*.bias``."""
    take: dict[str, str] = Field(default_factory=dict)
    """Parts of the model, by the beginning of their names, that begin as other parts of the checkpoint:
    ``{"plugins.sequence_classification.pooler" = "classifiers.pooler"}``."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The learning rate of a layer is that of the one above it times this; heads have ``train.lr``. 1: all alike."""
    keep_zeros: bool = False
    """Weights of the layers' matrices that are zero in the checkpoint, as ``megalm prune`` leaves them, stay zero."""
    metric: str | None = None
    """What evaluations (``eval.every``) are compared by: ``loss``, a term as ``terms.NAME``, or a head's metric as
    ``metrics.NAME``; default: a head's first metric, else the loss."""
    goal: Literal["min", "max"] | None = None
    """Whether less of it is better, or more; default: as the head says of a metric, less of a loss."""
    min_delta: float = Field(default=0.0, ge=0)
    """It has to become better by more than this."""
    patience: int = Field(default=0, ge=0)
    """Evaluations without anything better after which the run ends; 0: it takes all its steps."""
    keep_best: bool = True
    """Save a checkpoint after each evaluation that is the best so far, and keep the last of these whatever
    ``checkpoint.keep`` says; ``checkpoints/best`` names it."""


class EvalConfig(Settings):
    """Evaluation on the validation part."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only after the last step."""
    samples: int = Field(default=256, ge=1)
    """Rows to evaluate on while training: the first of the validation part, or all where it has fewer."""
    final_samples: int | None = Field(default=None, ge=1)
    """Rows of the evaluation after the last step; default: ``samples``."""
    baselines: bool = False
    """Fit unigram and bigram models to the training tokens and record their loss on the validation tokens."""


class CheckpointConfig(Settings):
    """Checkpoints and where to start from."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only after the last step."""
    keep: int = Field(default=2, ge=1)
    """Complete checkpoints to keep: the newest. A damaged one does not count, and the last good one stays."""
    keep_every: int = Field(default=0, ge=0)
    """Keep besides, for good, the checkpoints of every so many steps; 0: none."""
    async_save: bool = False
    """Write in the background: the step waits only for a copy to host memory, which takes as much as the state does."""
    load: Folder | None = None
    """Start from this checkpoint: its folder, or a run or a ``latest`` file, whose newest one is meant. It must be
    whole; there is no fallback to an older one."""
    preemption_deadline: float = Field(default=25.0, gt=0)
    """Seconds after SIGTERM within which the run saves and ends. torchrun and most clusters kill after 30."""
    allow_changed_plugins: bool = False
    """Go on from a checkpoint although a plugin that made it has another version or source here."""


class LogConfig(Settings):
    """What is shown and recorded."""

    every: int = Field(default=1, ge=1)
    """Steps between console lines. metrics.jsonl has every step."""
    callbacks: list[str] = Field(default_factory=list)
    """Components of kind ``callbacks`` (tensorboard, wandb, ...); settings in ``[callback.NAME]``."""


class SampleConfig(Settings):
    """Text generated when training ends (causal models)."""

    prompt: str = "\n"
    """What to continue."""
    tokens: int = Field(default=200, ge=0, le=1_000_000)
    """Tokens to generate; 0: none."""
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the likeliest token."""
    top_k: int = Field(default=0, ge=0)
    """Draw among the k likeliest tokens; 0: all."""


class Config(Settings):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    launch: LaunchConfig = LaunchConfig()
    parallel: ParallelConfig = ParallelConfig()
    kernels: KernelsConfig = KernelsConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    sample: SampleConfig = SampleConfig()
    objective: dict[str, dict[str, Any]] = Field(default_factory=dict)
    head: dict[str, dict[str, Any]] = Field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = Field(default_factory=dict)
    lr_schedule: dict[str, dict[str, Any]] = Field(default_factory=dict)
    data_source: dict[str, dict[str, Any]] = Field(default_factory=dict)
    pipeline_schedule: dict[str, dict[str, Any]] = Field(default_factory=dict)
    callback: dict[str, dict[str, Any]] = Field(default_factory=dict)
