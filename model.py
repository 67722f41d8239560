"""The Nemotron-4 architecture: 340B Technical Report (arXiv 2406.11704), section 2.2.

A decoder-only Transformer: pre-norm LayerNorm with a zero-centred gain, rotary positions on the
first half of each head, grouped-query attention, a squared-ReLU MLP, no biases in the linear
layers, untied embeddings. It knows nothing of ranks: parallel.py shards the model from outside.

    python -c "import torch, model as m; print(m.Nemotron(m.SHAPES['nano'])(torch.tensor([[7]])))"

Shapes in comments: B batch  T tokens  S keys  D dim  H query heads  K key-value heads  E head_dim
F ffn_dim  V vocab_size. Under tensor parallelism H, K, F and V are this rank's share.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:  # flash-attn-4 by itself brings a package of this name, but without the interface
    from flash_attn import flash_attn_interface as flash_attn
except ImportError:  # it is optional, and exists for CUDA only
    flash_attn = None

IGNORE = -100  # the target of a token that no loss counts; data.py writes it
Rope = tuple[Tensor, Tensor]  # cos and sin, fp32 (B, T, 1, rope_dim / 2)


def check_ranges(config: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError for the first field outside its (least, most); None passes, NaN does not."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}={value}: must be in {least:g}..{most:g}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. The defaults are common to all Nemotron-4 models."""

    dim: int  # Width of the residual stream
    n_layers: int  # Number of blocks
    n_heads: int  # Number of query heads
    n_kv_heads: int  # Number of key-value heads, each shared by as many query heads
    head_dim: int  # Width of a head
    ffn_dim: int  # Width of the MLP's hidden layer
    vocab_size: int = 256_000  # Number of rows of each embedding
    seq_len: int = 4096  # Tokens of a training sequence, and of the longest context
    init_std: float = 0.0134  # Standard deviation of the initial weights
    rope_base: float = 10_000.0  # Base of the rotary wavelengths
    rope_fraction: float = 0.5  # Share of a head's dimensions that are rotated
    norm_eps: float = 1e-5  # Number added to a variance in LayerNorm
    n_attributes: int = 0
    """Outputs of the reward head (5 in HelpSteer2; NVIDIA ships 9). 0: a language model."""
    lora_rank: int = 0
    """Rank of adapters beside frozen matrices (arXiv 2106.09685). 0: every weight is trained."""
    lora_alpha: float = 32.0
    """Scale of the adapters: multiplied by lora_alpha / lora_rank."""
    lora_targets: str = "wq wk wv wo up down"
    """Matrices that have an adapter."""

    def __post_init__(self) -> None:
        """Refuse an impossible shape, naming its numbers."""
        # sizes are at least 1, what is 0 by default and fractions at least 0
        ranges = {f.name: (f.type is int and f.default != 0, 1e8) for f in fields(self)[:-1]}
        check_ranges(self, ranges)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.rope_dim not in range(2, self.head_dim + 1, 2):
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_dim} rotates "
                f"{self.rope_dim} dimensions: must be even, in 2..head_dim"
            )
        targets = set(self.lora_targets.split())
        if not targets or targets - set(ModelConfig.lora_targets.split()):
            raise ValueError(f"lora_targets={self.lora_targets!r}: some of wq wk wv wo up down")

    @property
    def rope_dim(self) -> int:
        """Dimensions of each head that are rotated."""
        return int(self.head_dim * self.rope_fraction)


# Sources: report Table 1 (340B), arXiv 2402.16819 Table 1 (15B), NVIDIA's launch scripts and
# config.json files (the others). nano (every detail of the 340B, at a laptop's size) and small (for
# one GPU) are ours, with init_std near 1 / sqrt(dim) as in the 340B and 15B. A short row ends with
# the defaults.
# fmt: off
SHAPES = {
    #                               dim   L   H   K    E      F       V   seq  init_std
    "nano":           ModelConfig(  256,  4,  8,  4,  32,  1024,   1024,  256, 0.05),
    "small":          ModelConfig(  768, 12, 12,  4,  64,  3072,  32768, 1024, 0.03),
    "minitron-4b":    ModelConfig( 3072, 32, 24,  8, 128,  9216),
    "minitron-8b":    ModelConfig( 4096, 32, 48,  8, 128, 16384),
    "nemotron3-8b":   ModelConfig( 4096, 32, 32, 32, 128, 16384, 256000, 4096, 0.010),
    "nemotron4-15b":  ModelConfig( 6144, 32, 48,  8, 128, 24576),
    "nemotron3-22b":  ModelConfig( 6144, 40, 48, 48, 128, 24576, 256000, 4096, 0.008),
    "nemotron4-340b": ModelConfig(18432, 96, 96,  8, 192, 73728, 256000, 4096, 0.0063),
}
# fmt: on


def at_least_fp32(x: Tensor) -> Tensor:
    """Return bf16 and fp16 as fp32, and leave fp32 and fp64 as they are."""
    return x.float() if x.itemsize < 4 else x


class LayerNorm1P(nn.LayerNorm):
    """LayerNorm with gain 1 + weight, so that weight decay and a zero init mean gain one."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        gain = 1 + self.weight.to(wide.dtype)  # bf16 would keep 8 bits of it
        bias = self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, gain, bias, self.eps).to(x.dtype)


def rope_angles(cfg: ModelConfig, positions: Tensor) -> Rope:
    """Return cos and sin for positions (B, T), in fp32: bf16 would merge neighbouring positions."""
    exponent = torch.arange(0, cfg.rope_dim, 2, device=positions.device).float() / cfg.rope_dim
    angle = positions[..., None, None].float() * cfg.rope_base**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rope_dim of each head of x (B, T, H, E): i pairs with i + rope_dim / 2."""
    half = cos.shape[-1]
    a, b, rest = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def boundaries(documents: Tensor) -> Tensor:
    """Return where each of the packed documents (B, T) begins in the flat batch, and its end, as
    int32 (n + 1). Done on a CPU's ids, as on a GPU's, how many there are would be waited for."""
    changes = F.pad(documents.diff(dim=1), (1, 0), value=1)  # not 0 where one begins
    return F.pad(changes.flatten().nonzero().flatten(), (0, 1), value=changes.numel()).int()


def visible_keys(positions: Tensor, documents: Tensor | None, cache: Any) -> Tensor | None:
    """Return which keys each query may attend to, once for all layers. `attend` reads it.

    Plain causal attention: None. With a cache of S slots, where slot = position: a bool mask
    (B, 1, T, S). With documents (B, T), ids that attention does not cross: a bool mask
    (B, 1, T, T). Their `boundaries` stay as they are, for a GPU's variable-length kernel.
    """
    if cache is not None:
        slots = torch.arange(cache.n_keys, device=positions.device)
        return (positions[:, :, None] >= slots)[:, None]
    if documents is None or documents.ndim == 1:
        return documents
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Compute softmax(q kᵀ / sqrt(E)) v, softmax in fp32, for q (B, T, H, E), k and v (B, S, K, E).

    The one place that picks a kernel: torch's variable-length one for packed documents on a GPU;
    else flash-attn if installed, or scaled_dot_product_attention, which picks its own backend.
    """
    if visible is not None and visible.ndim == 1:
        return attend_within_documents(q, k, v, visible)
    if visible is None and flash_attn and q.is_cuda and q.element_size() == 2:
        return flash_attn.flash_attn_func(q, k, v, causal=True)
    one_token = visible is not None and q.shape[1] == 1
    # (B, H, T, E); in decoding (B, K, H / K, E): the query heads of a key-value head stand as its
    # tokens, so that k and v are not repeated
    queries = q.view(q.shape[0], k.shape[2], -1, q.shape[3]) if one_token else q.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        queries.to(k.dtype),  # a cache may hold more than q's precision
        k.transpose(1, 2),
        v.transpose(1, 2),
        visible,
        is_causal=visible is None,
        enable_gqa=queries.shape[1] != k.shape[2],
    )
    return (out.view_as(q) if one_token else out.transpose(1, 2)).to(q.dtype)


def attend_within_documents(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Attend on a GPU, in bf16 or fp16, without crossing a document. starts: see `boundaries`."""
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler: seconds

    T = q.shape[1]  # no document is longer
    # (B * T, H, E); torch 2.11's kernel knows no grouped queries
    flat = [t.repeat_interleave(q.shape[2] // t.shape[2], dim=2).flatten(0, 1) for t in (q, k, v)]
    return varlen_attn(*flat, starts, starts, T, T, window_size=(-1, 0)).view_as(q)


class Projection(nn.Linear):
    """Compute W x, or with an adapter W x + (alpha / rank) B A x, where W is frozen."""

    def __init__(self, cfg: ModelConfig, name: str, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.has_adapter = cfg.lora_rank > 0 and name in cfg.lora_targets.split()
        if self.has_adapter:
            self.factor = cfg.lora_alpha / cfg.lora_rank
            self.lora_a = nn.Parameter(torch.zeros(cfg.lora_rank, n_in))
            self.lora_b = nn.Parameter(torch.zeros(n_out, cfg.lora_rank))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.has_adapter:
            y = y + self.factor * F.linear(F.linear(x, self.lora_a), self.lora_b)
        return y


class Attention(nn.Module):
    """Grouped-query attention. cache.extend(layer, k, v, positions) stores k, v and returns all."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = cfg.head_dim
        q_dim = cfg.n_heads * cfg.head_dim
        kv_dim = cfg.n_kv_heads * cfg.head_dim
        self.wq = Projection(cfg, "wq", cfg.dim, q_dim)
        self.wk = Projection(cfg, "wk", cfg.dim, kv_dim)
        self.wv = Projection(cfg, "wv", cfg.dim, kv_dim)
        self.wo = Projection(cfg, "wo", q_dim, cfg.dim)

    def forward(
        self, x: Tensor, rope: Rope, visible: Tensor | None, positions: Tensor, cache: Any
    ) -> Tensor:
        heads = (*x.shape[:2], -1, self.head_dim)  # -1: a tensor-parallel rank has some heads only
        q = rotate(self.wq(x).view(heads), *rope)  # (B, T, H, E)
        k = rotate(self.wk(x).view(heads), *rope)  # (B, T, K, E)
        v = self.wv(x).view(heads)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, positions)  # (B, S, K, E)
        return self.wo(attend(q, k, v, visible).flatten(2))


class SquaredRelu(torch.autograd.Function):
    """Compute relu(x)². Its derivative 2 relu(x) is twice the root of the result, exactly: the root
    undoes the square's rounding. So only the result is kept, which the next product keeps too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        squared = F.relu(x).square_()
        ctx.save_for_backward(squared)
        return squared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0].sqrt().mul_(grad).mul_(2)


class MLP(nn.Module):
    """Compute down(relu(up(x))²): two matrices and no gate."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = Projection(cfg, "up", cfg.dim, cfg.ffn_dim)
        self.down = Projection(cfg, "down", cfg.ffn_dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(SquaredRelu.apply(self.up(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.mlp_norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, *attention_args: Any) -> Tensor:
        x = x + self.attn_branch(x, *attention_args)
        return x + self.mlp_branch(x)

    # methods, so that parallel.py can recompute parts of each branch by itself
    def attn_branch(self, x: Tensor, *attention_args: Any) -> Tensor:
        return self.attn(self.attn_norm(x), *attention_args)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.mlp_norm(x))


class Head(nn.Linear):
    """Map states (B, T, D) to logits (B, T, V), or to fp32 log-probabilities of targets (B, T).
    This is the definition; parallel.py computes the same without holding the logits."""

    def forward(self, h: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(h)
        if targets is None:
            return logits
        classes = at_least_fp32(logits).transpose(1, 2)  # (B, V, T)
        return -F.cross_entropy(classes, targets, reduction="none", ignore_index=IGNORE)


class RewardHead(nn.Linear):
    """Map states (B, T, D) to scores, fp32 (B, T, n_attributes). A response's are at its end."""

    def forward(self, h: Tensor, targets: Tensor | None = None) -> Tensor:
        return F.linear(*map(at_least_fp32, (h, self.weight, self.bias)))


class Nemotron(nn.Module):
    """Language model, or reward model if cfg.n_attributes. Weights are drawn from seed 0."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        # keyed by layer number, so that a pipeline stage that drops the others keeps the names
        self.blocks = nn.ModuleDict({str(i): Block(cfg, i) for i in range(cfg.n_layers)})
        self.norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        head = RewardHead if cfg.n_attributes else Head
        self.head = head(cfg.dim, cfg.n_attributes or cfg.vocab_size, bias=cfg.n_attributes > 0)
        freeze(self)
        if not self.embed.weight.is_meta:
            init_weights(self, seed=0)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        targets: Tensor | None = None,
        head: bool = True,
    ) -> Tensor:
        """Map token ids (B, T), or a later pipeline stage's input (B, T, D), to the head's output.

        positions (B, T) restart with each packed document; documents (B, T) are ids that attention
        does not cross. cache: keys of earlier positions, by `extend` (see Attention); `n_keys`: one
        more than the largest of positions, but for padding.
        head=False returns the states (B, T, D) that the head would read.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        rope = rope_angles(self.cfg, positions)
        visible = visible_keys(positions, documents, cache)
        # embed, norm or head is None where another pipeline stage holds it
        h = self.embed(x) if self.embed else x
        for block in self.blocks.values():
            h = block(h, rope, visible, positions, cache)
        h = self.norm(h) if self.norm else h
        return self.head(h, targets) if self.head and head else h


def freeze(model: Nemotron) -> None:
    """Freeze all but the adapters, if there are any, and a reward model's head, which is new."""
    for name, p in model.named_parameters():
        is_new = "lora_" in name or (model.cfg.n_attributes and name.startswith("head."))
        p.requires_grad_(is_new or not model.cfg.lora_rank)


# ---- initialisation and counts -------------------------------------------------------------------


def gaussian(seed: int, name: str, index: Tensor) -> Tensor:
    """Return standard normals, fp32, of (seed, name, element's index) alone, so any shard agrees.
    splitmix64 mixes the index; the two 32-bit halves of the result give one Box-Muller draw."""
    x = index * -7046029254386353131 + (zlib.crc32(f"{seed}/{name}".encode()) << 31)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # & makes the shift logical
    halves = torch.stack([x >> 32, x]) & 0xFFFFFFFF
    u, w = (halves.double() + 0.5) / 2**32
    return ((-2 * u.log()).sqrt() * (2 * math.pi * w).cos()).float()


def all_of(p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return a parameter's data and the indices that it holds along each dimension: all of them."""
    return p.data, [torch.arange(n, device=p.device) for n in p.shape]


@torch.no_grad()
def init_weights(model: Nemotron, seed: int, local: Callable = all_of) -> None:
    """Draw normal(0, init_std), output projections over sqrt(2 n_layers); norms get gain 1, bias 0.
    `local` returns the part of a parameter that lives here, so any mesh starts from the same."""
    for name, p in model.named_parameters():
        data, index = local(p)
        # norms, the reward head's bias, and one factor of an adapter, so that it begins as none
        if data.ndim < 2 or name.endswith("lora_b"):
            data.zero_()
            continue
        std = p.shape[1] ** -0.5 if name.endswith("lora_a") else model.cfg.init_std
        if name.endswith(("wo.weight", "down.weight")):
            std /= math.sqrt(2 * model.cfg.n_layers)
        rows, cols = index
        # some rows at a time, which bounds the 64-bit temporaries
        for part, r in zip(data.split(1024), rows.split(1024), strict=True):
            part.copy_(std * gaussian(seed, name, r[:, None] * p.shape[1] + cols))


def matrix_params(cfg: ModelConfig) -> int:
    """Count a block's parameters in matrices."""
    return 2 * cfg.dim * (cfg.head_dim * (cfg.n_heads + cfg.n_kv_heads) + cfg.ffn_dim)


def count_params(cfg: ModelConfig) -> tuple[int, int]:
    """Count (embedding, non-embedding) parameters as the report does: 9.4 B + 331.6 B."""
    norm = 2 * cfg.dim  # gain and bias
    head = cfg.n_attributes * (cfg.dim + 1)  # a reward head replaces the output embedding
    embedding = cfg.vocab_size * cfg.dim * (1 if cfg.n_attributes else 2)
    return embedding, cfg.n_layers * (matrix_params(cfg) + 2 * norm) + norm + head


def flops_per_token(cfg: ModelConfig) -> int:
    """Count forward and backward FLOPs of a token, by the formula behind the report's MFU column.

    Grouped-query aware, attention not halved for causality, one output-matrix pass, no recompute.
    """
    scores = 2 * cfg.seq_len * cfg.n_heads * cfg.head_dim
    head = (cfg.n_attributes or cfg.vocab_size) * cfg.dim
    return 6 * (cfg.n_layers * (matrix_params(cfg) + scores) + head)


# ---- Hugging Face names --------------------------------------------------------------------------

HF_NAMES = {
    "embed": "model.embed_tokens",
    "attn_norm": "input_layernorm",
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
# config.json: the names of our sizes, and what holds for every Nemotron
# fmt: off
HF_SIZES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings",
    "init_std": "initializer_range", "norm_eps": "norm_eps", "rope_base": "rope_theta",
    "rope_fraction": "partial_rotary_factor",
}
HF_FIXED = {
    "model_type": "nemotron",
    "hidden_act": "relu2", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}
# fmt: on


def hf_name(name: str, cfg: ModelConfig) -> str:
    """Map blocks.3.attn.wq.weight to model.layers.3.self_attn.q_proj.weight, and so on."""
    path, _, kind = name.rpartition(".")
    if path == "head" and cfg.n_attributes:
        return f"score.{kind}"
    if path.startswith("blocks."):
        _, layer, path = path.split(".", 2)
        return f"model.layers.{layer}.{HF_NAMES[path]}.{kind}"
    return f"{HF_NAMES[path]}.{kind}"


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """Make the config.json that transformers opens as a causal or a reward (score) model."""
    kind = "SequenceClassification" if cfg.n_attributes else "CausalLM"
    sizes = {key: getattr(cfg, name) for name, key in HF_SIZES.items()}
    rotary = {key: sizes[key] for key in ("rope_theta", "partial_rotary_factor")}
    return {
        "architectures": [f"NemotronFor{kind}"],
        # transformers 4 and vLLM read the rotary sizes here, transformers 5 in rope_parameters
        **sizes,
        "rope_parameters": {"rope_type": "default", **rotary},
        **HF_FIXED,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "num_labels": cfg.n_attributes or 2,  # 2 is the default
    }


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Read a config.json of any transformers version or converter; refuse what is not built."""
    # versions differ in where they keep what the rotary embedding needs
    flat = {**hf, **(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    flat = {key: value for key, value in flat.items() if value is not None}
    fixed = {**HF_FIXED, "rope_type": "default", "type": "default"}
    for key, value in fixed.items():
        if flat.get(key, value) != value:
            raise ValueError(f"config.json has {key}={flat[key]!r}: only {value!r} is built")
    # converters spell the rotary share in two more ways, which transformers ignores without a word
    for key in {"rope_percent", "rope_percentage"} & flat.keys():
        share = flat[key]
        if flat.setdefault("partial_rotary_factor", share) != share:
            raise ValueError(f"config.json has {key}={share} and another partial_rotary_factor")
    sizes = {name: flat[key] for name, key in HF_SIZES.items() if key in flat}
    sizes.setdefault("n_kv_heads", sizes["n_heads"])  # absent or null: multi-head attention
    sizes.setdefault("head_dim", sizes["dim"] // sizes["n_heads"])
    if "SequenceClassification" in str(flat.get("architectures")):
        sizes["n_attributes"] = flat.get("num_labels") or len(flat.get("id2label", ())) or 2
    return ModelConfig(**sizes)
