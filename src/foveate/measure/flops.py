"""What a prefill costs on paper: FLOPs and KV bytes of the decoder, from its sizes and the visual tokens in each layer.

Lives here: the two formulas and the report of `foveate flops`. Not here: the schedule of a method (`schedule`), time
and memory as measured, the vision tower, the cost of deciding (0.2-1.6 % of one layer, see `ops.attention`).

One unit everywhere: a FLOP is one addition or one multiplication, so a multiply-add (MAC) is 2 FLOPs, as torch counts.
What papers of this field print as FLOPs are multiply-adds.

With n tokens in a layer (all of them, text included), C = hidden size, m = MLP width, H query and G key/value heads of
width d, V = vocabulary:

* `paper_macs`: multiply-adds, sum over layers of 4 n C^2 + 2 n^2 C + 3 n C m, as if G d = H d = C; what the SparseVLM
  paper prints. LLaVA-1.5-7B with 576 + 118 tokens: 4.62 T (its Table 1), which are 9.25 TFLOPs.
* `exact_flops`: sum over layers of 2 n (2 C H d + 2 C G d + k C m) + 4 n^2 H d, with k = 3 matrices in a gated MLP and
  2 in a plain one, plus 2 C V per position whose logits are computed. Equals `torch.utils.flop_counter` on eager
  attention: attention as a full n x n matrix (what a causal or sliding mask hides is counted), no norms, activations
  or RoPE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.trace import Trace
from ..reduction import Budget, Reducer, build
from .geometry import Geometry
from .schedule import Schedule, schedule

__all__ = ["PAPER_FORMULA", "exact_flops", "kv_bytes", "paper_macs", "report"]

PAPER_FORMULA = (
    "4nC^2 + 2n^2C + 3nCm multiply-adds (MACs) per decoder layer, n = all tokens entering it; 2 FLOPs per multiply-add"
)


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


def paper_macs(geometry: Geometry, visual: Schedule | Trace | Tensor | Sequence[int] | None = None) -> int:
    """Multiply-adds of a prefill as the papers count them: sum over layers of 4 n C^2 + 2 n^2 C + 3 n C m.

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
        visual: as in `paper_macs`.
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
        visual: as in `paper_macs`.
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

    `tmacs` are `paper_macs` at the layers' inputs, what is really computed; `tflops` are twice as many, and `reduction`
    is a fraction of `tflops_full`. The SparseVLM paper does the same: its schedules for 192 | 128 | 64 tokens of
    LLaVA-1.5-7B give 53.8 | 62.5 | 71.6 % here, 53.7 | 62.8 | 71.9 % (2.14 | 1.72 | 1.30 T) in its Table 1. Its *token
    counts*, however, are means after each layer (`visual_tokens_after`); at the inputs the same schedules average
    206.5 | 145.4 | 82.2. Its cache sizes (302.4 -> 100.8 MB) are those averages without the text; `kv_mb` has the text
    and what each layer really stores.

    Args:
        geometry: a preset, a `Geometry`, or a config as in `Geometry.from_config`.
        method: name of a method, or the method itself.
        keep: its budget; also as text ("192", "0.22"). None for the default of the method.
        visual_tokens: of the prompt, instead of the geometry's.
        text_tokens: of the prompt, instead of the geometry's.
        dtype_bytes: of the KV cache, 2 for fp16 and bf16.
        **chosen: further options of the method, e.g. `layer=16`.

    Returns:
        `geometry`, `method`, `keep`; `tmacs`, `tmacs_full` (1e12 multiply-adds, see `formula`), `tflops`, `tflops_full`
        (1e12 FLOPs, 2 per multiply-add), `reduction`;
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
    cost, full = paper_macs(shape, plan), paper_macs(shape)
    return {
        "geometry": shape.name,
        "method": method.name or type(method).__name__,
        "keep": _plain(getattr(method, "keep", None)),
        "tmacs": cost / 1e12,
        "tmacs_full": full / 1e12,
        "tflops": 2 * cost / 1e12,
        "tflops_full": 2 * full / 1e12,
        "reduction": 1 - cost / full,
        "visual_tokens_entering": plan.mean_entering,
        "visual_tokens_after": plan.mean_after,
        "kv_mb": kv_bytes(shape, plan, dtype_bytes) / 1e6,
        "kv_mb_full": kv_bytes(shape, dtype_bytes=dtype_bytes) / 1e6,
        "formula": PAPER_FORMULA,
    }


def _plain(keep: Any) -> Any:
    return keep.keep if isinstance(keep, Budget) else keep
