"""What a prefill costs on paper: FLOPs and KV bytes of the decoder, from its sizes and the visual tokens in each layer.

Lives here: the two formulas, the schedule of a method without weights, and the report of `foveate flops`. Not here:
time and memory as measured, the vision tower, the cost of deciding (0.2-1.6 % of one layer, see `ops.attention`).

With n tokens in a layer (all of them, text included), C = hidden size, m = MLP width, H query and G key/value heads of
width d, V = vocabulary:

* `paper_flops`: sum over layers of 4 n C^2 + 2 n^2 C + 3 n C m. Multiply-adds, not FLOPs, and as if G d = H d = C; what
  the SparseVLM paper prints. LLaVA-1.5-7B with 576 + 118 tokens: 4.62 T (its Table 1).
* `exact_flops`: sum over layers of 2 n (2 C H d + 2 C G d + k C m) + 4 n^2 H d, with k = 3 matrices in a gated MLP and
  2 in a plain one, plus 2 C V per position whose logits are computed. Equals `torch.utils.flop_counter` on eager
  attention: two FLOPs per multiply-add, attention as a full n x n matrix (what a causal or sliding mask hides is
  counted), no norms, activations or RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..engine.session import apply
from ..engine.trace import Trace
from ..reduction import Budget, Reducer, UnsupportedError, build
from .geometry import Geometry

__all__ = ["PAPER_FORMULA", "Schedule", "exact_flops", "kv_bytes", "paper_flops", "report", "schedule"]

PAPER_FORMULA = "4nC^2 + 2n^2C + 3nCm per decoder layer, n = all tokens entering it (multiply-adds)"
_SYSTEM_TOKENS = 35  # before the image in LLaVA-1.5's prompt
_NO_ATTENTION = "foveate_schedule"


class Schedule(NamedTuple):
    """Visual tokens, merged ones included, in each decoder layer.

    Two averages are in use: `mean_entering` is over what each layer computes; `mean_after`, over what is left behind
    it, is what SparseVLM's tables call the number of retained tokens.
    """

    entering: Tensor
    """(layers,) long, at the input of each layer."""
    after: Tensor
    """(layers,) long, left after each layer and the decision behind it."""

    @property
    def mean_entering(self) -> float:
        """Mean over the layers of the visual tokens entering them."""
        return float(self.entering.double().mean())

    @property
    def mean_after(self) -> float:
        """Mean over the layers of the visual tokens left after them."""
        return float(self.after.double().mean())


# ------------------------------------------------------------------------------------------------------- formulas
def _lengths(
    geometry: Geometry, visual: Schedule | Trace | Tensor | Sequence[int] | None, fillers: bool = False
) -> list[list[int]]:
    """Tokens entering each layer, one list per row; with `fillers` those of a trace as computed, padding included."""
    if isinstance(visual, Trace):
        if visual.n_layers != geometry.layers:
            raise ValueError(f"{geometry.name} has {geometry.layers} layers, the trace {visual.n_layers}")
        active = [visual.active(layer - 1) for layer in range(visual.n_layers)]
        counts = torch.stack([layer.sum(1) for layer in active], dim=1)
        if fillers:
            # Padding goes with the first token that is removed; from then on rows are as long as the longest.
            whole = torch.tensor([torch.equal(layer, visual.tokens) for layer in active], device=counts.device)
            counts = torch.where(whole, visual.tokens.shape[1], counts.amax(0)).expand_as(counts)
        return counts.tolist()
    if visual is None:
        visual = [geometry.visual_tokens] * geometry.layers
    counts = torch.as_tensor(visual.entering if isinstance(visual, Schedule) else visual)
    if counts.shape != (geometry.layers,):
        raise ValueError(
            f"{geometry.name} has {geometry.layers} layers; got visual tokens of shape {tuple(counts.shape)}"
        )
    return [(counts + geometry.text_tokens).tolist()]


def paper_flops(geometry: Geometry, visual: Schedule | Trace | Tensor | Sequence[int] | None = None) -> int:
    """Prefill cost as the papers print it: sum over layers of 4 n C^2 + 2 n^2 C + 3 n C m multiply-adds.

    Args:
        geometry: the decoder; its `text_tokens` are added to the visual ones (a trace brings its own text).
        visual: a schedule, or the visual tokens entering each layer (layers,); a trace, whose rows are added up
            (padding and the fillers of a ragged batch are not counted); None for the unreduced prompt.

    Raises:
        ValueError: another number of layers than the geometry has.
    """
    width, middle = geometry.hidden_size, geometry.intermediate_size
    return sum(
        4 * n * width**2 + 2 * n**2 * width + 3 * n * width * middle
        for row in _lengths(geometry, visual)
        for n in row
    )  # fmt: skip


def exact_flops(
    geometry: Geometry,
    visual: Schedule | Trace | Tensor | Sequence[int] | None = None,
    logits: int = 1,
    fillers: bool = False,
) -> int:
    """Prefill FLOPs of the decoder as torch counts them: 2 n (2 C H d + 2 C G d + k C m) + 4 n^2 H d per layer.

    Args:
        geometry: the decoder.
        visual: as in `paper_flops`.
        logits: positions per row for which the language-model head runs, 2 C V each; `generate` needs 1, 0 leaves the
            head out.
        fillers: count the padding and the fillers of a ragged batch of a trace, too: they are computed.

    Raises:
        ValueError: another number of layers than the geometry has.
    """
    width, heads, groups = (
        geometry.hidden_size,
        geometry.heads * geometry.head_dim,
        geometry.kv_heads * geometry.head_dim,
    )
    mlp = (3 if geometry.gated_mlp else 2) * width * geometry.intermediate_size
    weights = 2 * width * heads + 2 * width * groups + mlp
    rows = _lengths(geometry, visual, fillers)
    layers = sum(2 * n * weights + 4 * n**2 * heads for row in rows for n in row)
    return layers + len(rows) * logits * 2 * width * geometry.vocab_size


def kv_bytes(
    geometry: Geometry,
    visual: Schedule | Trace | Tensor | Sequence[int] | None = None,
    dtype_bytes: int = 2,
    fillers: bool = False,
) -> int:
    """Bytes of the KV cache after the prefill, text included: 2 G d per token and layer.

    A layer stores the tokens that entered it; a sliding one at most its window less one, as transformers does.

    Args:
        geometry: the decoder.
        visual: as in `paper_flops`.
        dtype_bytes: 2 for fp16 and bf16.
        fillers: count the padding and the fillers of a ragged batch of a trace, too: they are stored.

    Raises:
        ValueError: another number of layers than the geometry has.
    """
    stored = 0
    for row in _lengths(geometry, visual, fillers):
        for layer, n in enumerate(row):
            window = geometry.window(layer)
            stored += n if window is None else min(n, window - 1)
    return 2 * geometry.kv_heads * geometry.head_dim * stored * dtype_bytes


# ------------------------------------------------------------------------------------------------------- schedule
def schedule(geometry: Geometry, reducer: Reducer) -> Schedule:
    """How many visual tokens a method leaves in each layer, without weights.

    The method itself is run, on a random decoder of the geometry's depth and prompt but of width 32 and without
    attention between tokens, so no method needs a second book-keeping. Where the number of tokens depends on the image
    (rank rules, thresholds), it is what noise gives, not what a real picture would.

    Args:
        geometry: depth and prompt. The text is put as in LLaVA-1.5: 35 tokens before the image, the rest after it.
        reducer: the method; `prepare` is called on it.

    Raises:
        UnsupportedError: the method reads a vision tower, which a geometry does not describe.
        ValueError: no visual token, or no text after the image.
    """
    if geometry.visual_tokens < 1 or geometry.text_tokens < 1:
        raise ValueError(
            f"{geometry.name}: a schedule needs visual and text tokens, "
            f"got {geometry.visual_tokens} and {geometry.text_tokens}"
        )
    name = getattr(reducer, "name", "") or type(reducer).__name__
    if getattr(reducer, "vision_taps", None):
        raise UnsupportedError(
            f"{name} reads the vision tower, so its schedule cannot be worked out without a model; run foveate bench"
        )
    before = min(_SYSTEM_TOKENS, geometry.text_tokens - 1)
    length = geometry.visual_tokens + geometry.text_tokens
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[:, before : before + geometry.visual_tokens] = True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        decoder = _stand_in(geometry.layers, length)
        try:
            with apply(decoder, reducer, visual=visual) as session:
                decoder(inputs_embeds=torch.randn(1, length, decoder.config.hidden_size), logits_to_keep=1)
        except UnsupportedError as error:
            raise UnsupportedError(f"{name} cannot be followed without a model: {error}") from error
    assert session.trace is not None
    return Schedule(session.trace.visual_tokens[0], session.trace.visual_tokens_after[0])


def _stand_in(layers: int, length: int) -> LlamaForCausalLM:
    if _NO_ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_NO_ATTENTION, _own_value)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=16,  # some methods choose among 14 heads or more
        vocab_size=8,
        max_position_embeddings=length,
    )
    config._attn_implementation = _NO_ATTENTION
    return LlamaForCausalLM(config).eval()


def _own_value(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
    """Attention in which every token sees itself: what a method taps comes from `query` and `key` anyway."""
    return value.transpose(1, 2), None


# --------------------------------------------------------------------------------------------------------- report
def report(
    geometry: Geometry | str | Any,
    method: str | Reducer,
    keep: int | float | str | None = None,
    *,
    visual_tokens: int | None = None,
    text_tokens: int | None = None,
    dtype_bytes: int = 2,
    **chosen: Any,
) -> dict[str, Any]:
    """What a method saves in the decoder's prefill, on paper.

    `reduction` is a fraction of `tflops_full`; both are `paper_flops` at the layers' inputs: what is really computed.
    The SparseVLM paper does the same: its schedules for 192 | 128 | 64 tokens of LLaVA-1.5-7B give 53.8 | 62.5 | 71.6 %
    here, 53.7 | 62.8 | 71.9 % (2.14 | 1.72 | 1.30 T) in its Table 1. Its *token counts*, however, are means after each
    layer (`visual_tokens_after`); at the inputs the same schedules average 206.5 | 145.4 | 82.2. Its cache sizes
    (302.4 -> 100.8 MB) are those averages without the text; `kv_mb` has the text and what each layer really stores.

    Args:
        geometry: a preset, a `Geometry`, or a config as in `Geometry.from_config`.
        method: name of a method, or the method itself.
        keep: its budget; also as text ("192", "0.22"). None for the default of the method.
        visual_tokens: of the prompt, instead of the geometry's.
        text_tokens: of the prompt, instead of the geometry's.
        dtype_bytes: of the KV cache, 2 for fp16 and bf16.
        **chosen: further options of the method, e.g. `layer=16`.

    Returns:
        `geometry`, `method`, `keep`; `tflops`, `tflops_full` (1e12, see `formula`), `reduction`;
        `visual_tokens_entering`, `visual_tokens_after` (means over the layers); `kv_mb`, `kv_mb_full` (1e6 bytes, all
        tokens of the prompt); `formula`.

    Raises:
        ValueError: unknown geometry, unreadable config, bad budget (`BudgetError`), unknown option (`OptionError`).
        UnsupportedError: the method needs more than a decoder.
    """
    shape = Geometry.of(geometry, visual_tokens, text_tokens)
    if isinstance(method, str):
        given = {} if keep is None else {"keep": Budget.parse(keep).keep}
        method = build(method, **given, **chosen)
    elif keep is not None or chosen:
        raise ValueError("keep and options belong to a method given by name; this one is built already")
    plan = schedule(shape, method)
    cost, full = paper_flops(shape, plan), paper_flops(shape)
    return {
        "geometry": shape.name,
        "method": method.name or type(method).__name__,
        "keep": _plain(getattr(method, "keep", None)),
        "tflops": cost / 1e12,
        "tflops_full": full / 1e12,
        "reduction": 1 - cost / full,
        "visual_tokens_entering": plan.mean_entering,
        "visual_tokens_after": plan.mean_after,
        "kv_mb": kv_bytes(shape, plan, dtype_bytes) / 1e6,
        "kv_mb_full": kv_bytes(shape, dtype_bytes=dtype_bytes) / 1e6,
        "formula": PAPER_FORMULA,
    }


def _plain(keep: Any) -> Any:
    return keep.keep if isinstance(keep, Budget) else keep
