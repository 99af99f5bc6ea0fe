"""What every part is built from: frozen, hashable descriptions, checked when they are made."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp

from jetspec_jax.errors import JetSpecError, shown

MAX_TREE_WIDTH = 16
MAX_TREE_BUDGET = 1024
ACCEPT_NODES = (2, 4, 8, 16, 32, 64)  # trees of which a head may say how much they accept
# Children per node that the scripts choose. best_first only takes those that are worth their place, so more never hurt.
TREE_WIDTHS = {"accum_logp": 7, "best_first": MAX_TREE_WIDTH, "chain": 1}
FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")
Builder = Literal["accum_logp", "best_first", "chain"]
KernelBackend = Literal["auto", "reference", "pallas", "pallas_interpret", "triton", "triton_interpret"]
RopeKind = Literal["linear", "llama3", "yarn", "table"]
THETA_LIMITS = (2.0, 1e30)  # that float32 computes angles from
EPS_LIMITS = (1e-30, 1e30)
MAX_INT = 2**31 - 1  # positions are int32
# Far above what anybody has made; what is beyond is damage, and would be counted to for hours.
MAX_LAYERS, MAX_EXPERTS, MAX_PARAMETERS = 4096, 2**16, 2**50


def require(holds: bool, message: str) -> None:
    """Raises JetSpecError with this message unless the condition holds."""
    if not holds:
        raise JetSpecError(message)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, NumPy's included; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_within(value: Any, limits: tuple[float, float]) -> bool:
    """Whether a value is a real number from the first limit to the second."""
    return is_number(value) and bool(limits[0] <= value <= limits[1])


def range_of(limits: tuple[float, float]) -> str:
    """Limits as messages tell them."""
    return f"a number from {limits[0]:g} to {limits[1]:g}"


def make_plain(config: Any) -> None:
    """Turns NumPy numbers into Python's and lists into tuples: configs are hashed, multiplied and written as JSON."""
    def plain(name: str, value: Any) -> Any:
        require(not is_integer(value) or abs(value) < 2**63, f"{name} must fit into 64 bits")
        return int(value) if is_integer(value) else float(value) if is_number(value) else value

    for entry in dataclasses.fields(config):
        name, value = entry.name, getattr(config, entry.name)
        object.__setattr__(config, name, tuple(plain(name, item) for item in value)
                           if isinstance(value, list | tuple) else plain(name, value))


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, NumPy's included; a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies differ from the plain ones; `jetspec_jax.rotary` says what each kind computes.

    A kind takes the fields that `FIELDS` lists for it, and no others.

    Args:
        kind: "linear" (every frequency is divided), "llama3" (the slow ones are), "yarn" (arXiv 2309.00071) or "table"
            (each has a divisor of its own).
        factor: what frequencies are divided by, at least 1.
        original_max_positions: the context that the model was trained with before.
        low_freq_factor, high_freq_factor: wavelengths above original_max_positions / low are divided, those below
            original_max_positions / high are not.
        beta_fast, beta_slow: frequencies that turn more often than beta_fast in the original context are not divided,
            those that turn less often than beta_slow are.
        attention_factor: what cosines and sines are multiplied by.
        truncate: whether the bounds between the two are whole frequencies.
        divisors: C/2 numbers.
    """

    FIELDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": ("factor",),
        "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "original_max_positions", "beta_fast", "beta_slow", "attention_factor", "truncate"),
        "table": ("divisors",)}

    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "factor": (1, 1e6), **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                                             "attention_factor"), (1e-6, 1e6)), "divisors": (1e-6, 1e30)}

    kind: RopeKind
    factor: float | None = None
    original_max_positions: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool | None = None
    divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        require(isinstance(self.kind, str) and self.kind in self.FIELDS,
                f"rope scaling of kind {shown(self.kind)} is not one of {', '.join(self.FIELDS)}")
        given = {entry.name for entry in fields(self) if getattr(self, entry.name) is not None} - {"kind"}
        for name in self.FIELDS[self.kind]:
            require(name in given, f"rope scaling of kind {self.kind} lacks {name}")
        for name in sorted(given - set(self.FIELDS[self.kind])):
            raise JetSpecError(f"rope scaling of kind {self.kind} has no {name}")
        for name in sorted(given & set(self.LIMITS) - {"divisors"}):
            limits, value = self.LIMITS[name], getattr(self, name)
            require(is_within(value, limits), f"{name} must be {range_of(limits)}, not {shown(value)}")
        original = self.original_max_positions
        require(original is None or (is_integer(original) and 0 < original <= MAX_INT),
                f"original_max_positions must be a positive integer, not {shown(original)}")
        require(self.truncate is None or isinstance(self.truncate, bool),
                f"truncate must be true or false, not {shown(self.truncate)}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            below, above = getattr(self, low), getattr(self, high)
            require(below is None or below < above, f"{low} {shown(below)} must be below {high} {shown(above)}")
        if self.divisors is not None:
            limits = self.LIMITS["divisors"]
            require(isinstance(self.divisors, tuple), f"divisors must be a list, not {shown(self.divisors)}")
            for value in self.divisors:
                require(is_within(value, limits),
                        f"each of the divisors must be {range_of(limits)}, not {shown(value)}")

    def context_limit(self, stated: int) -> int:
        """The `max_positions` of a model whose file states `stated` (for linear, the context before the scaling).

        linear: factor times what is stated. yarn: factor times the original context, or what is stated where that is
        more (Qwen3 states the context without the scaling). llama3 and a table: what is stated.
        """
        if self.kind == "linear":
            return int((self.factor or 1) * stated)
        if self.kind == "yarn":
            return max(stated, int((self.factor or 1) * (self.original_max_positions or 0)))
        return stated


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a stack of decoder layers, shared by target and head.

    Args:
        vocab_size: V, rows of the embedding table.
        hidden_size: D.
        intermediate_size: F, width of the gated MLP.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: K, key/value heads; divides H.
        head_dim: C, even.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they differ from the plain ones, or None.
        rms_norm_eps: epsilon of every RMSNorm.
        qk_norm: RMSNorm over C on queries and keys (Qwen3), or none (Llama).
        qkv_bias, out_bias: whether those projections of the attention carry a bias.
        dtype: dtype of the parameters and of the computation, a name of `FLOAT_DTYPES`.
        product_dtype: the operands of the projections' products are rounded to this dtype, and their sums stay wide
            (mixed precision, forward and backward; faster on CPUs with bfloat16 units). None: dtype.
        weight_tile: columns of the tiles in which the matrices are stored (see `jetspec_jax.tiles`); None: plain.
        shards: devices that share each layer. The heads and the MLP width above are then what one of them holds (see
            `share`); vocabulary and experts are counted whole.
        kernels: "auto" (the Pallas kernels on NVIDIA GPUs, plain JAX elsewhere), or one of them by name; "triton" is
            the attention in plain Triton (extra `gpu`) and the other kernels in Pallas; "pallas_interpret" and
            "triton_interpret" run the kernels slowly on the CPU, to test them.
    """

    kind: ClassVar[str] = "model"  # in messages
    shared: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size", "hidden_size")

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    dtype: str = "bfloat16"
    product_dtype: str | None = None
    weight_tile: int | None = None
    shards: int = 1
    kernels: KernelBackend = "auto"

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "shards"):
            value, most = getattr(self, name), MAX_LAYERS if name == "num_layers" else MAX_INT
            require(is_integer(value) and 0 < value <= most,
                    f"{name} must be an integer from 1 to {most}, not {shown(value)}")
        require(self.num_heads % self.num_kv_heads == 0,
                 f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        require(self.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        for name, limits in (("rope_theta", THETA_LIMITS), ("rms_norm_eps", EPS_LIMITS)):
            value = getattr(self, name)
            require(is_within(value, limits), f"{name} must be {range_of(limits)}, not {shown(value)}")
        self._check_rope_scaling()
        for name in ("qk_norm", "qkv_bias", "out_bias"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be true or false, not {shown(value)}")
        require(self.kernels in get_args(KernelBackend),
                 f"kernels {shown(self.kernels)} is not one of {', '.join(get_args(KernelBackend))}")
        tile = self.weight_tile
        require(tile is None or (is_integer(tile) and tile > 0), f"weight_tile must be a positive integer or None, not "
                                                                  f"{shown(tile)}")
        require(tile is None or (self.product_dtype is None and self.shards == 1),
                 "weights in tiles are neither rounded (product_dtype) nor shared: load them with tiles=False")
        for name in ("dtype", "product_dtype"):
            value = getattr(self, name)
            require(value in FLOAT_DTYPES or (name == "product_dtype" and value is None),
                     f"{name} {shown(value)} is not one of {', '.join(FLOAT_DTYPES)}")

    def _check_rope_scaling(self) -> None:
        scaling, half = self.rope_scaling, self.head_dim // 2
        require(scaling is None or isinstance(scaling, RopeScaling),
                f"rope_scaling must be a RopeScaling or None, not {shown(scaling)}")
        if scaling is None:
            return
        require(scaling.divisors is None or len(scaling.divisors) == half,
                f"rope_scaling has {len(scaling.divisors or ())} divisors, and head_dim {self.head_dim} needs {half}")

    def _check_parameters(self, more: int = 0) -> None:
        """Refuses sizes that are each possible and together are not; `more`: parameters besides those of all kinds."""
        layer = 3 * self.intermediate_size + 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        count = self.hidden_size * (self.num_layers * layer + 2 * self.vocab_size) + more
        require(count <= MAX_PARAMETERS, f"a {self.kind} of these sizes has about {count:.0e} parameters, more than "
                                         "any model has: is one of the sizes damaged?")

    @property
    def jnp_dtype(self) -> jnp.dtype:
        """`dtype` as JAX knows it."""
        return jnp.dtype(self.dtype)

    def with_dtype(self, dtype: str):
        """The same model with parameters and activations of another dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def share(self, shards: int):
        """What one of `shards` devices holds of this model.

        Raises:
            JetSpecError: a size that cannot be split evenly.
        """
        for name in self.shared:
            size = getattr(self, name)
            require(size % shards == 0, f"the {self.kind}'s {name} {size} cannot be split evenly over {shards} "
                                         "devices: choose a tensor parallelism that divides it")
        return dataclasses.replace(self, shards=shards, num_heads=self.num_heads // shards,
                                   num_kv_heads=self.num_kv_heads // shards,
                                   intermediate_size=self.intermediate_size // shards)


@dataclass(frozen=True, kw_only=True)
class TargetConfig(TransformerConfig):
    """The frozen target model (Qwen3, dense or with experts; Llama-style by the switches of `TransformerConfig`).

    Args:
        num_experts: E, the gated MLPs of a layer from which each token takes a few; 0: every layer is dense.
        num_experts_per_tok: how many a token takes.
        moe_intermediate_size: width of an expert.
        norm_topk_prob: the weights of a token's experts sum to one; otherwise they are their shares of all experts.
        dense_layers: layers with the plain MLP of `intermediate_size` in the place of experts.
        max_positions: the context limit, prompt and answer together, in tokens.
        tie_embeddings: the LM head is the embedding table.
        eos_token_ids: any of these ends an answer.
    """

    kind: ClassVar[str] = "target"
    shared: ClassVar[tuple[str, ...]] = (*TransformerConfig.shared, "num_experts")

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    max_positions: int = 40960
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_integer(self.max_positions) and 0 < self.max_positions <= MAX_INT,
                 f"max_positions must be an integer from 1 to {MAX_INT}, not {shown(self.max_positions)}")
        require(isinstance(self.eos_token_ids, tuple)
                and all(is_integer(i) and 0 <= i < self.vocab_size for i in self.eos_token_ids),
                 f"eos_token_ids must be token ids from 0 to {self.vocab_size - 1}, not {shown(self.eos_token_ids)}")
        for name in ("norm_topk_prob", "tie_embeddings"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be true or false, not {shown(value)}")
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            value, least = getattr(self, name), 1 if self.num_experts else 0
            most = MAX_EXPERTS if name == "num_experts" else MAX_INT
            require(is_integer(value) and least <= value <= most,
                     f"{name} must be an integer from {least} to {most}, not {shown(value)}")
        require(self.num_experts_per_tok <= self.num_experts,
                 f"num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}")
        require(isinstance(self.dense_layers, tuple),
                f"dense_layers must be a list of layers, not {shown(self.dense_layers)}")
        bad = [i for i in self.dense_layers if not is_integer(i) or not 0 <= i < self.num_layers]
        require(not bad, f"dense_layers {shown(bad)} lie outside the layers 0..{self.num_layers - 1}")
        self._check_parameters(3 * self.num_layers * self.num_experts * self.moe_intermediate_size * self.hidden_size)

    @functools.cached_property
    def _dense(self) -> frozenset[int]:
        return frozenset(self.dense_layers)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.num_experts > 0 and layer not in self._dense


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(TransformerConfig):
    """What heads of all kinds say of themselves and of their target.

    Args:
        block_size: G; 1..G-1 are the drafted depths.
        target_layer_ids: the T layers of the target whose outputs are tapped.
        num_target_layers: L of the target that the head was made for.
    """

    kind: ClassVar[str] = "head"

    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_integer(self.block_size) and 2 <= self.block_size <= 256,
                 f"block_size must be an integer from 2 to 256, not {shown(self.block_size)}")
        require(is_integer(self.num_target_layers) and 0 < self.num_target_layers <= MAX_LAYERS,
                 f"num_target_layers must be an integer from 1 to {MAX_LAYERS}, not {shown(self.num_target_layers)}")
        require(isinstance(self.target_layer_ids, tuple),
                 f"target_layer_ids must be a list of layers, not {shown(self.target_layer_ids)}")
        require(len(self.target_layer_ids) > 0, "target_layer_ids is empty: the head needs at least one tapped layer")
        bad = [i for i in self.target_layer_ids if not is_integer(i) or not 0 <= i < self.num_target_layers]
        require(not bad, f"target_layer_ids {shown(bad)} lie outside the target's layers "
                         f"0..{self.num_target_layers - 1}")
        self._check_parameters(len(self.target_layer_ids) * self.hidden_size**2)

    def check_fits(self, target: TargetConfig) -> None:
        """Raises JetSpecError if this head was made for another target than `target`."""
        for what, mine, theirs in (("hidden size", self.hidden_size, target.hidden_size),
                                   ("number of target layers", self.num_target_layers, target.num_layers),
                                   ("vocabulary", self.vocab_size, target.vocab_size)):
            require(mine == theirs, f"the head does not fit the target: its {what} is {mine}, the target's {theirs}; "
                                     "use the head that was trained for this target")


@dataclass(frozen=True, kw_only=True)
class HeadConfig(DrafterConfig):
    """The parallel draft head (format of the released checkpoints, design of arXiv 2606.18394 section 3).

    Args:
        mask_token_id: the token whose embedding fills slots 1..G-1; slot 0 is the anchor.
        causal: slots attend causally within the block (JetSpec) or to all slots (DFlash).
        accept_lengths: mean tokens that a round of a best_first tree of each of `ACCEPT_NODES` adds, as somebody
            measured; empty where nobody did, shorter where larger trees were left out. It tells how large a tree pays.
    """

    mask_token_id: int
    causal: bool = True
    accept_lengths: tuple[float, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.accept_lengths
        require(isinstance(known, tuple) and len(known) <= len(ACCEPT_NODES)
                and all(is_within(mean, (1, most)) for mean, most in zip(known, ACCEPT_NODES, strict=False))
                and tuple(sorted(known)) == known,
                f"accept_lengths must be mean tokens a round by trees of {', '.join(map(str, ACCEPT_NODES))} nodes, "
                f"not {shown(known)}")
        require(is_integer(self.mask_token_id) and 0 <= self.mask_token_id < self.vocab_size,
                 f"mask_token_id {shown(self.mask_token_id)} lies outside the vocabulary of {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class AutoregressiveHeadConfig(DrafterConfig):
    """An EAGLE-3-style head (arXiv 2503.01840): one pass per depth, each reading the token drafted before."""

    @classmethod
    def like(cls, head: DrafterConfig) -> AutoregressiveHeadConfig:
        """The shape of another head."""
        return cls(**{field.name: getattr(head, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class TreeConfig:
    """How a draft tree is grown.

    Args:
        builder: "accum_logp" (the published default), "best_first" (DDTree) or "chain" (argmax of each depth).
        width: W, children per node, 1 to 16; a chain ignores it.
        budget: nodes of a tree at most, the root included.
    """

    builder: Builder = "accum_logp"
    width: int = 7
    budget: int = 64

    def __post_init__(self) -> None:
        make_plain(self)
        require(self.builder in get_args(Builder),
                 f"tree builder {shown(self.builder)} is not one of {', '.join(get_args(Builder))}")
        require(is_integer(self.width) and 1 <= self.width <= MAX_TREE_WIDTH,
                 f"tree width must be an integer from 1 to {MAX_TREE_WIDTH}, not {shown(self.width)}")
        require(is_integer(self.budget) and 1 <= self.budget <= MAX_TREE_BUDGET,
                 f"tree budget must be an integer from 1 to {MAX_TREE_BUDGET}, not {shown(self.budget)}")


@dataclass(frozen=True)
class PromptLookup:
    """Drafting without a head: what followed the last tokens where they occurred before is proposed again.

    Args:
        ngram: the longest run of last tokens that is looked for; shorter ones are tried where it is not found.
        length: tokens proposed at most.
    """

    ngram: int = 3
    length: int = 7

    def __post_init__(self) -> None:
        make_plain(self)
        require(is_integer(self.ngram) and 1 <= self.ngram <= 16,
                 f"ngram must be an integer from 1 to 16, not {shown(self.ngram)}")
        require(is_integer(self.length) and 1 <= self.length < MAX_TREE_BUDGET,
                 f"length must be an integer from 1 to {MAX_TREE_BUDGET - 1}, not {shown(self.length)}")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the same for plain and tree decoding.

    Args:
        temperature: 0 is greedy (the argmax); above 0, logits are divided by it.
        top_k: keep the k most likely tokens (ties with the k-th included), or None for all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p (ties included), or None.
            Applied after temperature and top_k, on the probabilities these leave.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        require(is_number(self.temperature) and 0 <= self.temperature <= 100,
                 f"temperature must be a number from 0 to 100, not {shown(self.temperature)}")
        require(self.temperature == 0 or self.temperature >= 1e-3,
                 f"temperature {shown(self.temperature)} is too small to divide by: use 0 for greedy decoding")
        require(self.top_k is None or (is_integer(self.top_k) and self.top_k >= 1),
                 f"top_k must be an integer of at least 1, or None, not {shown(self.top_k)}")
        require(self.top_p is None or (is_number(self.top_p) and 0 < self.top_p <= 1),
                 f"top_p must be above 0 and at most 1, or None, not {shown(self.top_p)}")
