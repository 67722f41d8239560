"""Nemotron-4: the architecture of the Nemotron-4 340B Technical Report (arXiv 2406.11704, section
2.2), and nothing else.

A decoder-only Transformer: pre-norm LayerNorm with a zero-centred gain, rotary positions on the
first half of each head, grouped-query attention, a squared-ReLU MLP, no biases in the linear
layers, untied input and output embeddings. This file knows nothing of ranks; parallel.py shards the
model from outside.

    python -c "import torch, model; print(model.Nemotron(model.SHAPES['nano'])(torch.zeros(1, 8,
    dtype=torch.long)).shape)"
"""
# Shapes in comments:  B batch  T tokens  S keys  D dim  H query heads  K key-value heads  E
# head_dim  F ffn_dim  V vocab_size Under tensor parallelism H, K, F and V are this rank's share.

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The logit that a target of IGNORE asks for is nobody's: data.py marks padding with it, losses
# leave it out.
IGNORE = -100


@dataclass(frozen=True)
class ModelConfig:
    """One model's shape. Defaults are what all Nemotron-4 models share; errors name the two numbers
    that disagree."""

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
    """0: a language model. Otherwise the outputs of the reward head (5 HelpSteer2 attributes, 9 in
    NVIDIA's checkpoint)."""

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "ffn_dim",
            "vocab_size",
            "seq_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.rope_dim % 2 or not 0 < self.rope_dim <= self.head_dim:
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head_dim={self.head_dim} rotates "
                f"{self.rope_dim} dimensions: "
                "must be an even number in 2..head_dim"
            )
        if self.n_attributes < 0:
            raise ValueError(
                f"n_attributes={self.n_attributes}: 0 for a language model, or the number of "
                f"attributes"
            )

    @property
    def rope_dim(self) -> int:
        return int(self.head_dim * self.rope_fraction)


# Report Table 1 (340B); arXiv 2402.16819 Table 1 (15B); NVIDIA's launch scripts and published
# config.json files (the others). nano and small are ours: nano has every detail of the 340B at the
# size of a laptop, small is for one GPU. Their init_std is near 1 / sqrt(dim), as the 340B's and
# the 15B's are.
# fmt: off
SHAPES = {                  # dim  layers heads kv  E   ffn     vocab    seq   init_std
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
    """LayerNorm whose gain is 1 + weight, so that weight decay or a zero init means gain one.
    Statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        fp = torch.promote_types(
            x.dtype, torch.float32
        )  # 1 + weight in bf16 would keep 8 bits of the gain
        y = F.layer_norm(x.to(fp), x.shape[-1:], 1 + self.weight.to(fp), self.bias.to(fp), self.eps)
        return y.to(x.dtype)


def rope_angles(cfg: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions (B, T) → cos, sin (B, T, 1, rope_dim / 2), fp32: bf16 angles would merge
    neighbouring positions."""
    exponent = (
        torch.arange(0, cfg.rope_dim, 2, dtype=torch.float32, device=positions.device)
        / cfg.rope_dim
    )
    angle = positions[..., None, None].float() * cfg.rope_base**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rope_dim of each head, x (B, T, H, E); dimension i pairs with i + rope_dim /
    2 (half-split)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat(
        [(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1
    )


def visible_keys(positions: Tensor, documents: Tensor | None, n_keys: int | None) -> Tensor | None:
    """What each query may attend to, worked out once for all layers.

    None: the plain causal mask. With a cache of n_keys slots, slot = position: bool (B, 1, T, S).
    With documents (B, T), int ids: no attention across them; a bool mask on CPU, on a GPU the
    documents' boundaries, int32 (n + 1), for a variable-length kernel.
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
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


HAVE_FLASH_ATTN = find_spec("flash_attn") is not None


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(E)) v with fp32 softmax; q (B, T, H, E), k and v (B, S, K, E) → (B, T, H,
    E).

    The one place that picks a kernel: flash-attn where installed, torch's variable-length kernel
    for packed documents on a GPU, otherwise scaled_dot_product_attention, which takes cuDNN or
    flash attention by itself.
    """
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if visible is not None and visible.dtype == torch.int32:
        if not half:
            raise ValueError(
                f"packed documents on a GPU need bf16 or fp16 attention, not {q.dtype}: set "
                f"--dtype bf16"
            )
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
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, tokens, E)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=gqa
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention. A cache, if given, is an argument: `cache.extend(layer, k, v,
    positions)` → all k, v."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = cfg.head_dim
        self.wq = nn.Linear(cfg.dim, cfg.n_heads * cfg.head_dim, bias=False)
        self.wk = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wv = nn.Linear(cfg.dim, cfg.n_kv_heads * cfg.head_dim, bias=False)
        self.wo = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        visible: Tensor | None,
        positions: Tensor,
        cache: Any,
    ) -> Tensor:
        heads = (
            *x.shape[:2],
            -1,
            self.head_dim,
        )  # -1: tensor parallelism leaves each rank a share of the heads
        q = rotate(self.wq(x).view(heads), cos, sin)  # (B, T, H, E)
        k = rotate(self.wk(x).view(heads), cos, sin)  # (B, T, K, E)
        v = self.wv(x).view(heads)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, positions)  # (B, S, K, E)
        return self.wo(attend(q, k, v, visible).flatten(2))


class MLP(nn.Module):
    """down(relu(up(x))²): two matrices and no gate."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(cfg.dim, cfg.ffn_dim, bias=False)
        self.down = nn.Linear(cfg.ffn_dim, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        self.attn = Attention(cfg, layer)
        self.mlp_norm = LayerNorm1P(cfg.dim, cfg.norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, *attention_args: Any) -> Tensor:
        x = x + self.attn(self.attn_norm(x), *attention_args)
        return x + self.mlp(self.mlp_norm(x))


class Head(nn.Linear):
    """States (B, T, D) → logits (B, T, V); given targets (B, T), their log-probabilities instead,
    fp32 (B, T).

    This is the definition. For training parallel.py installs the same without the (B, T, V) tensor.
    """

    def forward(self, h: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = super().forward(h)
        if targets is None:
            return logits
        fp = torch.promote_types(h.dtype, torch.float32)
        return -F.cross_entropy(
            logits.to(fp).transpose(1, 2), targets, reduction="none", ignore_index=IGNORE
        )


class RewardHead(nn.Linear):
    """States (B, T, D) → attribute scores, fp32 (B, T, n_attributes); a response's scores stand at
    its last token."""

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
        """Token ids (B, T) → logits (B, T, V), or see Head and RewardHead. In a later pipeline
        stage x is the hidden state.

        positions (B, T) restart with each packed document; documents (B, T) are ids that attention
        does not cross. cache: an object with `n_keys` and `extend` (see Attention), which holds the
        keys and values of earlier positions.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        cos, sin = rope_angles(self.cfg, positions)
        visible = visible_keys(positions, documents, cache.n_keys if cache is not None else None)
        # None: another pipeline stage holds the part
        h = self.embed(x) if self.embed is not None else x
        for block in self.blocks.values():
            h = block(h, cos, sin, visible, positions, cache)
        h = self.norm(h) if self.norm is not None else h
        return self.head(h, targets) if self.head is not None else h


# ---- initialisation ------------------------------------------------------------------------------


def gaussian(seed: int, name: str, index: Tensor) -> Tensor:
    """Standard normals, fp32, that depend on (seed, name, element's index) alone, whatever the
    shard or the device.

    The index goes through splitmix64's mixer; its two 32-bit halves give one Box-Muller draw.
    """
    x = index * -7046029254386353131 + zlib.crc32(f"{seed}/{name}".encode()) * 2654435769
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # & makes the shift logical
    u = (((x >> 32) & 0xFFFFFFFF).double() + 0.5) / 2**32
    w = ((x & 0xFFFFFFFF).double() + 0.5) / 2**32
    return ((-2 * u.log()).sqrt() * (2 * math.pi * w).cos()).float()


def whole(p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A parameter's storage here, and which indices along each dimension it holds: all of them."""
    return p.data, [torch.arange(n, device=p.device) for n in p.shape]


@torch.no_grad()
def init_weights(
    model: Nemotron, seed: int, local: Callable[[Tensor], tuple[Tensor, list[Tensor]]] = whole
) -> None:
    """Normal(0, init_std), the two output projections scaled by 1/sqrt(2 n_layers); norms at gain
    1, bias 0.

    `local` says what part of a parameter lives here (parallel.py passes its own), so each mesh
    starts from the same numbers.
    """
    for name, p in model.named_parameters():
        data, index = local(p)
        if data.ndim < 2:  # norms' gain offsets and biases, the reward head's bias
            data.zero_()
            continue
        std = model.cfg.init_std
        if name.endswith(("wo.weight", "down.weight")):
            std /= math.sqrt(2 * model.cfg.n_layers)
        rows, cols = index
        for part, r in zip(
            data.split(4096), rows.split(4096), strict=True
        ):  # bounds the fp64 temporaries
            part.copy_(std * gaussian(seed, name, r[:, None] * p.shape[1] + cols))


# ---- counts --------------------------------------------------------------------------------------


def count_params(cfg: ModelConfig) -> tuple[int, int]:
    """(embedding, non-embedding) as the report counts: input and output matrix are 9.4 B of the
    340B, the rest 331.6 B."""
    attention = cfg.dim * cfg.head_dim * 2 * (cfg.n_heads + cfg.n_kv_heads)
    block = attention + 2 * cfg.dim * cfg.ffn_dim + 4 * cfg.dim  # two norms of gain and bias
    head = cfg.n_attributes * (cfg.dim + 1) if cfg.n_attributes else 0
    embedding = cfg.vocab_size * cfg.dim * (1 if cfg.n_attributes else 2)
    return embedding, cfg.n_layers * block + 2 * cfg.dim + head


def flops_per_token(cfg: ModelConfig, seq_len: int | None = None) -> float:
    """Forward and backward FLOPs of one token: NVIDIA's formula behind the report's MFU column
    (SPEC 8).

    Grouped-query aware, attention not halved for causality, one output-matrix pass, no recompute.
    """
    T = seq_len or cfg.seq_len
    projections = cfg.dim * cfg.head_dim * 2 * (cfg.n_heads + cfg.n_kv_heads)
    scores = 2 * T * cfg.n_heads * cfg.head_dim
    head = (cfg.n_attributes or cfg.vocab_size) * cfg.dim
    return 6 * (cfg.n_layers * (projections + scores + 2 * cfg.dim * cfg.ffn_dim) + head)


# ---- Hugging Face names --------------------------------------------------------------------------

HF_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "blocks.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.attn_norm.bias": "model.layers.{}.input_layernorm.bias",
    "blocks.{}.attn.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attn.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attn.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attn.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.mlp_norm.bias": "model.layers.{}.post_attention_layernorm.bias",
    "blocks.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}


def hf_name(name: str, cfg: ModelConfig) -> str:
    """blocks.3.attn.wq.weight → model.layers.3.self_attn.q_proj.weight; a reward head is `score`,
    as in transformers."""
    if cfg.n_attributes and name.startswith("head."):
        return name.replace("head.", "score.")
    parts = name.split(".")
    layer = parts[1] if parts[0] == "blocks" else ""
    return HF_NAMES[name.replace(f".{layer}.", ".{}.", 1) if layer else name].format(layer)


def hf_config(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers opens as NemotronForCausalLM (or ForSequenceClassification:
    a reward model)."""
    rope = {"rope_theta": cfg.rope_base, "partial_rotary_factor": cfg.rope_fraction}
    return {
        "architectures": [
            "NemotronForSequenceClassification" if cfg.n_attributes else "NemotronForCausalLM"
        ],
        "model_type": "nemotron",
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.ffn_dim,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.seq_len,
        "initializer_range": cfg.init_std,
        "norm_eps": cfg.norm_eps,
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **({"num_labels": cfg.n_attributes} if cfg.n_attributes else {}),
        **rope,  # transformers 4 and vLLM read these, transformers 5 the next
        "rope_parameters": {"rope_type": "default", **rope},
    }


def config_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """A config.json of any transformers version or converter → ModelConfig. What we cannot honour
    is refused, not ignored."""
    fixed = {
        "hidden_act": "relu2",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    for key, value in fixed.items():
        if hf.get(key, value) != value:
            raise ValueError(
                f"config.json has {key}={hf[key]!r}: a Nemotron has {value!r}, and this code "
                f"no other"
            )
    # three spellings of the rotary share are in circulation, and transformers ignores two of them
    # silently
    nested = [hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    rope = {**hf, **nested[0], **nested[1]}
    for kind in (d.get("rope_type", d.get("type", "default")) for d in nested):
        if kind != "default":
            raise ValueError(f"config.json asks for rope_type={kind!r}: only 'default' is built")
    spelt = {
        k: rope[k]
        for k in ("partial_rotary_factor", "rope_percent", "rope_percentage")
        if rope.get(k) is not None
    }
    if len(set(spelt.values())) > 1:
        raise ValueError(f"config.json contradicts itself about the rotary share: {spelt}")
    heads = hf["num_attention_heads"]
    reward = "SequenceClassification" in str(hf.get("architectures"))
    return ModelConfig(
        dim=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=hf.get("num_key_value_heads") or heads,  # absent or null: multi-head attention
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn_dim=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        seq_len=hf.get("max_position_embeddings", 4096),
        init_std=hf.get("initializer_range", 0.0134),
        rope_base=rope.get("rope_theta", 10_000.0),
        rope_fraction=next(iter(spelt.values()), 0.5),
        norm_eps=hf.get("norm_eps", 1e-5),
        n_attributes=(hf.get("num_labels") or len(hf.get("id2label") or {}) or 2) if reward else 0,
    )
