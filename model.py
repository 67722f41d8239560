"""The Nemotron-4 architecture: 340B Technical Report (arXiv 2406.11704), section 2.2.

A decoder-only Transformer: pre-norm LayerNorm with a zero-centred gain, rotary positions on the
first half of each head, grouped-query attention, a squared-ReLU MLP, no biases in the linear
layers, untied embeddings. It knows nothing of ranks: parallel.py shards the model from outside.

    python -c "import torch, model as m; print(m.Nemotron(m.SHAPES['nano'])(torch.tensor([[7]])))"
"""
# Shapes in comments: B batch  T tokens  S keys  D dim  H query heads  K key-value heads
# E head_dim  F ffn_dim  V vocab_size. Under tensor parallelism H, K, F and V are this rank's share.

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the target of a token that no loss counts; data.py writes it
HAVE_FLASH_ATTN = find_spec("flash_attn") is not None
Rope = tuple[Tensor, Tensor]  # cos and sin, fp32 (B, T, 1, rope_dim / 2)


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. The defaults are common to all Nemotron-4 models."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int = 256_000
    seq_len: int = 4096
    init_std: float = 0.0134
    rope_base: float = 10_000.0
    rope_fraction: float = 0.5
    norm_eps: float = 1e-5
    n_attributes: int = 0
    """0: a language model; else the reward head's outputs (5 in HelpSteer2, NVIDIA ships 9)."""
    lora_rank: int = 0
    """Of adapters beside frozen matrices (arXiv 2106.09685); 0: none, every weight is trained."""
    lora_alpha: float = 32.0
    """Adapters are multiplied by lora_alpha / lora_rank."""
    lora_targets: str = "wq wk wv wo up down"
    """The matrices that have one."""

    def __post_init__(self) -> None:
        sizes = "dim n_layers n_heads n_kv_heads head_dim ffn_dim vocab_size seq_len"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        H, K, E, rotated = self.n_heads, self.n_kv_heads, self.head_dim, self.rope_dim
        if H % K:
            raise ValueError(f"n_heads={H} is not a multiple of n_kv_heads={K}")
        if rotated % 2 or not 0 < rotated <= E:
            share = f"rope_fraction={self.rope_fraction} of head_dim={E}"
            raise ValueError(f"{share} rotates {rotated} dimensions: must be even, in 2..head_dim")
        if min(self.n_attributes, self.lora_rank) < 0:
            numbers = f"n_attributes={self.n_attributes}, lora_rank={self.lora_rank}"
            raise ValueError(f"{numbers}: must be at least 0")
        have, some = {"wq", "wk", "wv", "wo", "up", "down"}, set(self.lora_targets.split())
        if not some or not some <= have:
            raise ValueError(f"lora_targets={self.lora_targets!r}: some of {sorted(have)}")

    @property
    def rope_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction)


# Sources: report Table 1 (340B), arXiv 2402.16819 Table 1 (15B), NVIDIA's launch scripts and
# config.json files (the others). nano, every detail of the 340B at a laptop's size, and small, for
# one GPU, are ours, with init_std near 1 / sqrt(dim) as in the 340B and the 15B. L is n_layers.
# fmt: off
SHAPES = {
    #                               dim   L   H   K    E      F       V   seq  init_std
    "nano":           ModelConfig(  256,  4,  8,  4,  32,  1024,   1024,  256, 0.05),
    "small":          ModelConfig(  768, 12, 12,  4,  64,  3072,  32768, 1024, 0.03),
    "minitron-4b":    ModelConfig( 3072, 32, 24,  8, 128,  9216, 256000, 4096, 0.0134),
    "minitron-8b":    ModelConfig( 4096, 32, 48,  8, 128, 16384, 256000, 4096, 0.0134),
    "nemotron3-8b":   ModelConfig( 4096, 32, 32, 32, 128, 16384, 256000, 4096, 0.010),
    "nemotron4-15b":  ModelConfig( 6144, 32, 48,  8, 128, 24576, 256000, 4096, 0.0134),
    "nemotron3-22b":  ModelConfig( 6144, 40, 48, 48, 128, 24576, 256000, 4096, 0.008),
    "nemotron4-340b": ModelConfig(18432, 96, 96,  8, 192, 73728, 256000, 4096, 0.0063),
}
# fmt: on


class LayerNorm1P(nn.Module):
    """LayerNorm with gain 1 + weight, so that weight decay and a zero init mean gain one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        # at least fp32: the statistics, and 1 + weight, of which bf16 would keep 8 bits
        fp = torch.promote_types(x.dtype, torch.float32)
        y = F.layer_norm(x.to(fp), x.shape[-1:], 1 + self.weight.to(fp), self.bias.to(fp), self.eps)
        return y.to(x.dtype)


def rope_angles(cfg: ModelConfig, positions: Tensor) -> Rope:
    """positions (B, T) → cos and sin in fp32: bf16 angles would merge neighbouring positions."""
    exponent = torch.arange(0, cfg.rope_dim, 2, device=positions.device).float() / cfg.rope_dim
    angle = positions[..., None, None].float() * cfg.rope_base**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rope_dim of each head of x (B, T, H, E): i pairs with i + rope_dim / 2."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.cat([a.to(x.dtype), b.to(x.dtype), rest], dim=-1)


def visible_keys(positions: Tensor, documents: Tensor | None, n_keys: int | None) -> Tensor | None:
    """What each query may attend to, worked out once for all layers.

    Alone: None, the plain causal mask. With a cache of n_keys slots, slot = position: bool
    (B, 1, T, S). With documents (B, T), ids that attention does not cross: bool (B, 1, T, T) on
    CPU; on a GPU their boundaries, int32 (n + 1), for a variable-length kernel.
    """
    if n_keys is not None:
        return (positions[:, :, None] >= torch.arange(n_keys, device=positions.device))[:, None]
    if documents is None:
        return None
    if documents.is_cuda:
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        ends = torch.tensor([documents.numel()], device=documents.device)
        return torch.cat([starts.flatten().nonzero().flatten(), ends]).int()
    return (documents[:, :, None] == documents[:, None, :]).tril()[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(E)) v, softmax in fp32: q (B, T, H, E), k and v (B, S, K, E) → like q.

    The one place that picks a kernel: flash-attn if installed; else torch's variable-length kernel
    for packed documents on a GPU, and scaled_dot_product_attention, which picks its own backend.
    """
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if visible is not None and visible.dtype == torch.int32:
        if not half:
            need = "packed documents on a GPU need bf16 or fp16 attention"
            raise ValueError(f"{need}, not {q.dtype}: set --mesh.dtype bf16")
        flat, T = [t.flatten(0, 1) for t in (q, k, v)], q.shape[1]
        if HAVE_FLASH_ATTN:
            from flash_attn import flash_attn_varlen_func

            return flash_attn_varlen_func(*flat, visible, visible, T, T, causal=True).view_as(q)
        from torch.nn.attention.varlen import varlen_attn

        flat = [t.repeat_interleave(q.shape[2] // t.shape[1], dim=1) for t in flat]
        return varlen_attn(*flat, visible, visible, T, T, window_size=(-1, 0)).view_as(q)
    if half and HAVE_FLASH_ATTN and visible is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=True)
    if visible is not None and q.shape[1] == 1:
        # decoding: the query heads of a key-value head stand as its tokens; k, v are not repeated
        group = q.view(q.shape[0], k.shape[2], -1, q.shape[3]).to(k.dtype)  # (B, K, H / K, E)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(group, k, v, visible).view_as(q).to(q.dtype)
    dtype, q = q.dtype, q.to(k.dtype)  # a cache may hold more than q's precision
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, E)
    causal, gqa = visible is None, q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=gqa)
    return out.transpose(1, 2).to(dtype)


class LoraLinear(nn.Linear):
    """W x + (alpha / rank) B A x, with W frozen."""

    def __init__(self, n_in: int, n_out: int, rank: int, alpha: float) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.lora_a = nn.Parameter(torch.zeros(rank, n_in))
        self.lora_b = nn.Parameter(torch.zeros(n_out, rank))
        self.factor = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.factor * F.linear(F.linear(x, self.lora_a), self.lora_b)


def make_linear(cfg: ModelConfig, name: str, n_in: int, n_out: int) -> nn.Linear:
    if cfg.lora_rank and name in cfg.lora_targets.split():
        return LoraLinear(n_in, n_out, cfg.lora_rank, cfg.lora_alpha)
    return nn.Linear(n_in, n_out, bias=False)


class Attention(nn.Module):
    """Grouped-query attention. cache.extend(layer, k, v, positions) stores k and v, returns all."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = cfg.head_dim
        self.wq = make_linear(cfg, "wq", cfg.dim, cfg.n_heads * cfg.head_dim)
        self.wk = make_linear(cfg, "wk", cfg.dim, cfg.n_kv_heads * cfg.head_dim)
        self.wv = make_linear(cfg, "wv", cfg.dim, cfg.n_kv_heads * cfg.head_dim)
        self.wo = make_linear(cfg, "wo", cfg.n_heads * cfg.head_dim, cfg.dim)

    def forward(
        self, x: Tensor, rope: Rope, visible: Tensor | None, positions: Tensor, cache: Any
    ) -> Tensor:
        # -1: tensor parallelism leaves each rank a share of the heads
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.wq(x).view(heads), *rope)  # (B, T, H, E)
        k = rotate(self.wk(x).view(heads), *rope)  # (B, T, K, E)
        v = self.wv(x).view(heads)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, positions)  # (B, S, K, E)
        return self.wo(attend(q, k, v, visible).flatten(2))


class SquaredRelu(torch.autograd.Function):
    """relu(x)², whose derivative is 2 relu(x), the root of the result doubled. The root undoes the
    square's rounding, so that nothing is kept but what the next product keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        y = y.mul_(y)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0].sqrt().mul_(grad).mul_(2)


class MLP(nn.Module):
    """down(relu(up(x))²): two matrices and no gate."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = make_linear(cfg, "up", cfg.dim, cfg.ffn_dim)
        self.down = make_linear(cfg, "down", cfg.ffn_dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(SquaredRelu.apply(self.up(x)))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.mlp_norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, *attention_args: Any) -> Tensor:
        x = x + self.attn_branch(x, *attention_args)
        return x + self.mlp_branch(x)

    # two methods, so that parallel.py can recompute parts of each by itself
    def attn_branch(self, x: Tensor, *attention_args: Any) -> Tensor:
        return self.attn(self.attn_norm(x), *attention_args)

    def mlp_branch(self, x: Tensor) -> Tensor:
        return self.mlp(self.mlp_norm(x))


class Head(nn.Linear):
    """States (B, T, D) → logits (B, T, V), or with targets their log-probabilities, fp32 (B, T).

    This is the definition; parallel.py trains with the same, computed without the logits.
    """

    def forward(self, h: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(h)
        if targets is None:
            return logits
        fp = torch.promote_types(h.dtype, torch.float32)
        logits = logits.to(fp).transpose(1, 2)
        return -F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)


class RewardHead(nn.Linear):
    """States (B, T, D) → scores, fp32 (B, T, n_attributes); a response's are at its last token."""

    def forward(self, h: Tensor, targets: Tensor | None = None) -> Tensor:
        fp = torch.promote_types(h.dtype, torch.float32)
        return F.linear(h.to(fp), self.weight.to(fp), self.bias.to(fp))


class Nemotron(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.dim)
        # keyed by layer number, so that a pipeline stage that drops the others keeps the names
        self.blocks = nn.ModuleDict({str(i): Block(cfg, i) for i in range(cfg.n_layers)})
        self.norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        if cfg.n_attributes:
            self.head = RewardHead(cfg.dim, cfg.n_attributes, bias=True)
        else:
            self.head = Head(cfg.dim, cfg.vocab_size, bias=False)
        freeze(self)
        if self.embed.weight.device.type != "meta":
            init_weights(self, seed=0)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Any = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Token ids (B, T) → what the head returns. A later pipeline stage takes states (B, T, D).

        positions (B, T) restart with each packed document; documents (B, T) are ids that attention
        does not cross. cache: `n_keys` and `extend` (see Attention), for keys of earlier positions.
        """
        h = self.hidden(x, positions, documents, cache)
        return self.head(h, targets) if self.head is not None else h

    def hidden(
        self, x: Tensor, positions: Tensor | None, documents: Tensor | None, cache: Any
    ) -> Tensor:
        """The states (B, T, D) that the head reads; generate.py wants it to read few of them."""
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        rope = rope_angles(self.cfg, positions)
        visible = visible_keys(positions, documents, None if cache is None else cache.n_keys)
        # embed, norm or head is None where another pipeline stage holds it
        h = self.embed(x) if self.embed is not None else x
        for block in self.blocks.values():
            h = block(h, rope, visible, positions, cache)
        return self.norm(h) if self.norm is not None else h


def freeze(model: Nemotron) -> None:
    """With adapters, they alone are trained, and the head of a reward model, which is new."""
    for name, p in model.named_parameters():
        new = "lora_" in name or (model.cfg.n_attributes > 0 and name.startswith("head"))
        p.requires_grad_(new or not model.cfg.lora_rank)


# ---- initialisation and counts -------------------------------------------------------------------


def gaussian(seed: int, name: str, index: Tensor) -> Tensor:
    """Standard normals, fp32, of (seed, name, index of the element) alone: any shard agrees.

    splitmix64 mixes the index; the two 32-bit halves of the result give one Box-Muller draw.
    """
    x = index * -7046029254386353131 + (zlib.crc32(f"{seed}/{name}".encode()) << 31)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # & makes the shift logical
    u = (((x >> 32) & 0xFFFFFFFF).double() + 0.5) / 2**32
    w = ((x & 0xFFFFFFFF).double() + 0.5) / 2**32
    return ((-2 * u.log()).sqrt() * (2 * math.pi * w).cos()).float()


def all_of(p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A parameter's storage here and the indices it holds along each dimension: all of them."""
    return p.data, [torch.arange(n, device=p.device) for n in p.shape]


@torch.no_grad()
def init_weights(model: Nemotron, seed: int, local: Callable = all_of) -> None:
    """Normal(0, init_std), output projections over sqrt(2 n_layers); norms at gain 1, bias 0.

    `local` says which part of a parameter lives here: parallel.py passes its own, and every mesh
    starts from the same numbers.
    """
    for name, p in model.named_parameters():
        data, index = local(p)
        # norms' gain offsets and biases, the reward head's bias; an adapter begins as none
        if data.ndim < 2 or name.endswith("lora_b"):
            data.zero_()
            continue
        std = p.shape[1] ** -0.5 if name.endswith("lora_a") else model.cfg.init_std
        if name.endswith(("wo.weight", "down.weight")):
            std /= math.sqrt(2 * model.cfg.n_layers)
        rows, cols = index
        # some rows at a time, which bounds the 64-bit temporaries
        for part, r in zip(data.split(4096), rows.split(4096), strict=True):
            part.copy_(std * gaussian(seed, name, r[:, None] * p.shape[1] + cols))


def count_params(cfg: ModelConfig) -> tuple[int, int]:
    """(embedding, non-embedding), as the report counts: 9.4 B + 331.6 B for the 340B."""
    attention = cfg.dim * cfg.head_dim * 2 * (cfg.n_heads + cfg.n_kv_heads)
    block = attention + 2 * cfg.dim * cfg.ffn_dim + 4 * cfg.dim  # two norms of gain and bias
    head = cfg.n_attributes * (cfg.dim + 1)  # a reward head replaces the output embedding
    embedding = cfg.vocab_size * cfg.dim * (1 if cfg.n_attributes else 2)
    return embedding, cfg.n_layers * block + 2 * cfg.dim + head


def flops_per_token(cfg: ModelConfig, seq_len: int | None = None) -> float:
    """Forward and backward FLOPs of one token, by the formula behind the report's MFU column.

    Grouped-query aware, attention not halved for causality, one output-matrix pass, no recompute.
    """
    T = seq_len or cfg.seq_len
    projections = cfg.dim * cfg.head_dim * 2 * (cfg.n_heads + cfg.n_kv_heads)
    scores = 2 * T * cfg.n_heads * cfg.head_dim
    head = (cfg.n_attributes or cfg.vocab_size) * cfg.dim
    return 6 * (cfg.n_layers * (projections + scores + 2 * cfg.dim * cfg.ffn_dim) + head)


# ---- Hugging Face names --------------------------------------------------------------------------

HF_NAMES = {
    "embed": "model.embed_tokens",
    "blocks.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.wq": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.wk": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.wv": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.wo": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
# config.json: the names of our sizes, and what holds for every Nemotron
# fmt: off
HF_SIZES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings",
    "init_std": "initializer_range", "norm_eps": "norm_eps",
}
HF_FIXED = {
    "hidden_act": "relu2", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}
# fmt: on


def hf_name(name: str, cfg: ModelConfig) -> str:
    """blocks.3.attn.wq.weight → model.layers.3.self_attn.q_proj.weight; a reward head is score."""
    *path, kind = name.split(".")
    if cfg.n_attributes and path == ["head"]:
        return f"score.{kind}"
    layer = ""
    if path[0] == "blocks":
        layer, path[1] = path[1], "{}"
    return HF_NAMES[".".join(path)].format(layer) + f".{kind}"


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers opens as NemotronForCausalLM, or its reward model's."""
    kind = "SequenceClassification" if cfg.n_attributes else "CausalLM"
    rope = {"rope_theta": cfg.rope_base, "partial_rotary_factor": cfg.rope_fraction}
    return {
        "architectures": [f"NemotronFor{kind}"],
        "model_type": "nemotron",
        **{key: getattr(cfg, name) for name, key in HF_SIZES.items()},
        **HF_FIXED,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **({"num_labels": cfg.n_attributes} if cfg.n_attributes else {}),
        **rope,  # transformers 4 and vLLM read these, transformers 5 the next
        "rope_parameters": {"rope_type": "default", **rope},
    }


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """A config.json of any transformers version or converter; what we cannot honour is refused."""
    for key, value in HF_FIXED.items():
        if hf.get(key, value) != value:
            raise ValueError(f"config.json has {key}={hf[key]!r}: only {value!r} is built")
    nested = [hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    for kind in (d.get("rope_type", d.get("type", "default")) for d in nested):
        if kind != "default":
            raise ValueError(f"config.json has rope_type={kind!r}: only 'default' is built")
    # three spellings of the rotary share circulate; transformers ignores two without a word
    rope = {**hf, **nested[0], **nested[1]}
    spellings = ("partial_rotary_factor", "rope_percent", "rope_percentage")
    shares = {key: rope[key] for key in spellings if rope.get(key) is not None}
    if len(set(shares.values())) > 1:
        raise ValueError(f"config.json contradicts itself about the rotary share: {shares}")
    sizes = {name: hf[key] for name, key in HF_SIZES.items() if hf.get(key) is not None}
    sizes.setdefault("n_kv_heads", sizes["n_heads"])  # absent or null: multi-head attention
    sizes.setdefault("head_dim", sizes["dim"] // sizes["n_heads"])
    reward = "SequenceClassification" in str(hf.get("architectures"))
    return ModelConfig(
        **sizes,
        rope_base=rope.get("rope_theta", 10_000.0),
        rope_fraction=next(iter(shares.values()), 0.5),
        n_attributes=(hf.get("num_labels") or len(hf.get("id2label") or {}) or 2) if reward else 0,
    )
