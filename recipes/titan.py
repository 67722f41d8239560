"""Train our model, plan and data with torchtitan's own Trainer: its command line, checkpoints,
float8, metrics and profiler, data-parallel on any number of devices.

    torchrun --nproc_per_node 8 -m recipes.titan --config small --training.steps 1000
    python -m recipes.titan --config nano --help

A config is a preset of train.py, or a function of a --module of yours that calls `config_of`. The
losses are those of train.py: the same first weights, samples, learning rates and normaliser. On a
CPU it runs in fp32. Tensor and pipeline parallelism and a batch that grows are left to train.py.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import torchtitan.tools.utils as titan_utils
import tyro
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from data import Sampler
from model import ModelConfig, Nemotron, count_params, flops_per_token, init_weights
from parallel import fsdp_units, head_forward, local_part, run
from train import PRESETS, PretrainConfig, open_data

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
    needed = f"torchtitan's Trainer needs torch 2.14 or newer, and this is {torch.__version__}"
    if __name__ == "__main__":
        sys.exit(f"recipes.titan: {needed}")
    raise ImportError(needed)


def stand_in_for_a_gpu() -> None:
    """Let torchtitan, which takes a GPU for granted, run on a machine without one."""
    titan_utils.device_type = "cpu"
    asked = ("set_device", "reset_peak_memory_stats", "empty_cache", "synchronize")
    titan_utils.device_module = SimpleNamespace(
        **dict.fromkeys(asked, lambda *_: None),
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda *_: "cpu",
        get_device_properties=lambda *_: SimpleNamespace(total_memory=1 << 40),
        memory_stats=lambda *_: {},
    )


if not torch.cuda.is_available():
    stand_in_for_a_gpu()  # before anything of torchtitan's that reads it

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import BaseLoss  # noqa: E402
from torchtitan.components.optimizer import (  # noqa: E402
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import TORCH_DTYPE_MAP  # noqa: E402
from torchtitan.distributed.activation_checkpoint import FullAC  # noqa: E402
from torchtitan.protocols import BaseModel  # noqa: E402
from torchtitan.protocols.model_spec import ModelSpec  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

# ---- model ---------------------------------------------------------------------------------------


class TitanNemotron(Nemotron, BaseModel):
    """Our model, with what torchtitan asks of one."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        """Holds the model's shape and the seed of its first weights."""

        shape: dict[str, Any] = field(default_factory=dict)
        seed: int = 0

        def model(self) -> ModelConfig:
            return ModelConfig(**self.shape)

        def update_from_config(self, *, config: Any, **_: Any) -> None:
            """Tell the parts of a run what the command line has changed, and refuse the rest."""
            ways = config.parallelism
            for name in ("tensor", "pipeline", "context"):
                degree = getattr(ways, f"{name}_parallel_degree")
                if degree > 1:
                    raise ValueError(f"{name}_parallel_degree={degree}: train.py has it, not this")
            self.shape = self.shape | {"seq_len": config.training.seq_len}
            rates = config.lr_scheduler
            if replace(rates, plan=None) != Rates.Config():
                raise ValueError("--lr-scheduler: the rates are the plan's, times the optimizer's")
            settings = config.training
            plan = replace(rates.plan, steps=settings.steps, batch=settings.global_batch_size)
            data = Path(config.dataloader.dataset_path)
            rates.plan = config.dataloader.plan = replace(plan, data=data)

        def get_nparams_and_flops(self, model: Any, seq_len: int) -> tuple[int, int]:
            return sum(count_params(self.model())), flops_per_token(self.model())

    def __init__(self, config: Config) -> None:
        super().__init__(config.model())
        self.seed = config.seed
        self.head.forward = partial(head_forward, self.head, None)  # never holds all the logits

    def verify_module_protocol(self) -> None:
        """Do nothing: our modules are plain ones, and the weights have their start from us."""

    def init_states(self, *, buffer_device: Any = None) -> None:
        init_weights(self, self.seed, local_part)


def parallelize(
    model: TitanNemotron, *, parallel_dims: Any, training: Any, parallelism: Any, ac_config: Any,
    compile_config: Any, dump_folder: str,
) -> TitanNemotron:  # fmt: skip
    """Recompute, compile and shard the model: a unit per block, embedding and head."""
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        for block in model.blocks.values():
            block.compile(backend=compile_config.backend)
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    mesh = parallel_dims.get_mesh(names)
    policy = MixedPrecisionPolicy(
        TORCH_DTYPE_MAP[training.mixed_precision_param],
        TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,  # it would round the rotary angles
    )
    for unit in (*model.blocks.values(), model.embed, [model.norm, model.head], model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for module in fsdp_units(model) if mesh.size() > 1 else ():
        module.set_gradient_divide_factor(1.0)  # the loss is divided by a global count
        module.set_force_sum_reduction_for_comms(True)
    return model


class NegativeLogLikelihood(BaseLoss):
    """Sums what our head returns for targets: log-probabilities."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.fn = lambda log_probs, labels: -log_probs.sum()


# ---- plan and data -------------------------------------------------------------------------------


class Rates(LRSchedulersContainer):
    """Gives the learning rates of our plan."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        plan: Annotated[PretrainConfig | None, tyro.conf.Suppress] = None

        def build(self, *, optimizers: Any, training_steps: int) -> "Rates":
            schedule = self.plan.schedule()
            last = min(training_steps, schedule.steps) - 1
            peak = schedule.segments[0].phase.lr
            return Rates(optimizers, lambda step: schedule.lr(min(step, last)) / peak)


class Samples(BaseDataLoader):
    """Our samples, in the order of train.py: the state is how many micro-batches were given out."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        plan: Annotated[PretrainConfig | None, tyro.conf.Suppress] = None

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, seq_len: int,
        local_batch_size: int, **_: Any,
    ) -> None:  # fmt: skip
        plan = config.plan
        data = open_data(replace(plan, model=replace(plan.model, seq_len=seq_len)))
        blends = {i: data.blend(blend) for i, blend in plan.schedule().blends().items()}
        how = dict(isolate=plan.isolate, later=blends)
        self.sampler = Sampler(data, blends[0], seq_len, plan.seed, **how)
        self.micro = local_batch_size
        self.share = plan.batch // dp_world_size  # of a step's samples
        self.ranks = dp_world_size
        self.rank = dp_rank
        self.given = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield this rank's contiguous share of each step's samples, a micro-batch at a time."""
        per_step = self.share // self.micro
        while True:
            step, i = divmod(self.given, per_step)
            first = (step * self.ranks + self.rank) * self.share + i * self.micro
            rows = self.sampler.batch(range(first, first + self.micro))
            tensors = {name: torch.as_tensor(value) for name, value in rows.items()}
            self.given += 1
            yield {"input": tensors.pop("tokens"), **tensors}, tensors["targets"]

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.given * self.micro * self.ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state.get("samples", 0) // (self.micro * self.ranks)


class Words(BaseTokenizer):
    """Stands for the tokenizer of a prepared folder, which training does not ask."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        super().__init__()

    def encode(self, *_: Any) -> Any:
        raise NotImplementedError("training reads tokens, not texts: see data.py")

    decode = get_vocab_size = encode


# ---- configs -------------------------------------------------------------------------------------


def optimizer_of(plan: PretrainConfig, peak: float) -> OptimizersContainer.Config:
    """Return AdamW with weight decay on matrices only."""
    groups = []
    for pattern, decay in (("norm", 0.0), ("", plan.weight_decay)):
        how = dict(lr=peak, betas=plan.betas, eps=plan.eps, weight_decay=decay)
        groups.append(
            ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=how)
        )
    return OptimizersContainer.Config(param_groups=groups)


def config_of(name: str, plan: PretrainConfig) -> Trainer.Config:
    """Return torchtitan's config of a pretraining run of ours."""
    segments = plan.schedule().segments
    batch = segments[0].batch
    if any(segment.batch != batch for segment in segments):
        raise ValueError(f"{name}: its batch grows from {batch} on: train.py can do that")
    spec = ModelSpec(
        name="nemotron4",
        flavor=name,
        model=TitanNemotron.Config(shape=asdict(plan.model), seed=plan.seed),
        parallelize_fn=parallelize,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
    config = Trainer.Config(
        dump_folder=f"runs/titan_{name}",
        model_spec=spec,
        tokenizer=Words.Config(),
        dataloader=Samples.Config(plan=plan, dataset_path=str(plan.data)),
        lr_scheduler=Rates.Config(plan=plan),
        optimizer=optimizer_of(plan, segments[0].phase.lr),
        loss=NegativeLogLikelihood.Config(),
        activation_checkpoint=FullAC.Config() if plan.mesh.recompute == "full" else None,
    )
    config.training.steps = plan.steps or plan.schedule().steps
    config.training.local_batch_size = plan.micro_batch
    config.training.global_batch_size = batch
    config.training.seq_len = plan.model.seq_len
    config.training.max_norm = plan.clip
    config.training.disable_cuda_graphs = True
    fp32 = plan.mesh.compute_dtype == "fp32"
    config.training.mixed_precision_param = "float32" if fp32 else "bfloat16"
    config.parallelism.spmd_backend = "partial_dtensor"
    return config


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    """Return the function of a preset, by which torchtitan asks for its config."""
    if name not in PRESETS:
        raise AttributeError(name)
    return lambda: config_of(name, PRESETS[name]())


def train() -> None:
    """Hand the command line to torchtitan's program."""
    from torchtitan.train import main

    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost")
    if "RANK" not in os.environ:  # started without torchrun
        os.environ |= alone | dict(MASTER_PORT="0")
    if "--module" not in sys.argv:
        sys.argv[1:1] = ["--module", "recipes.titan"]
    main()


if __name__ == "__main__":
    run(train)
