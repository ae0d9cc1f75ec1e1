"""VTW, Visual Tokens Withdrawal: from one layer on, the language model goes on without any visual token.

Paper: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", arXiv 2405.05803
(AAAI 2025). Official code: lzhxmu/VTW @ a3d8cfc3. The search for the layer is `foveate.tune.withdrawal_curve`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.select import rounded_ratio
from ..reduction import Budget, Decision, MethodInfo, OptionError, Positions, Reducer, View, register
from ._images import counts_per_row
from ._layers import check_layer, resolve_layer

if TYPE_CHECKING:
    from ..engine.families.parts import Anatomy

__all__ = ["VTW"]

_OFFICIAL_LAYER = 16


@register("vtw", MethodInfo(paper="arXiv 2405.05803", acts="at the input of one decoder layer", needs="nothing"))
@dataclass
class VTW(Reducer):
    """Withdraw all visual tokens at the input of decoder layer K, wherever they are in the prompt.

    Text between and after several images stays; layers before K see everything. No attention is read. The official code
    cuts out one slice and so serves one image per prompt only.

    Args:
        layer: K counted from 0, an int (0: no layer sees an image), or a float in (0, 1), a fraction of the depth.
            Default: half of the depth, 16 of 32 layers as in the official code. K depends on model and task: see
            `foveate.tune`.
        keep: instead of `layer`, the visual tokens per image (int) or their fraction (float in (0, 1]) that the decoder
            layers see on average: K = round(depth * fraction), at least 1; 1.0 withdraws nothing. A count is turned
            into a fraction of each sample's own visual tokens, so samples of one batch may differ in K. The mean can be
            met in steps of 1 / depth only; `Trace.mean_visual_tokens` says what it was.
        positions: "keep" (official default): text keeps its positions. "renumber": from K on, positions are counted
            without the image, also while decoding (the official code's other branch, "shift").
        faithful: the official layer, 16, at any depth unless `layer` is given as a number.

    Raises:
        BudgetError: bad `keep`.
        OptionError: bad `layer` or `positions`, both `layer` and `keep`; `layer` beyond the depth of the model when
            applied.
    """

    layer: int | float | None = None
    keep: int | float | None = None
    positions: Positions = "keep"
    faithful: bool = False

    def __post_init__(self) -> None:
        self._budget = None if self.keep is None else Budget(self.keep)
        if self.layer is not None:
            if self.keep is not None:
                raise OptionError(
                    f"layer={self.layer} and keep={self.keep}: give one of them, each determines the other"
                )
            check_layer(self.layer, first=0)
        if self.faithful and (self.keep is not None or isinstance(self.layer, float)):
            raise OptionError("faithful=True takes an absolute layer=, as the official code does")
        if self.positions not in ("keep", "renumber"):
            raise OptionError(f"positions={self.positions!r}: use 'keep' or 'renumber'")

    def prepare(self, anatomy: Anatomy) -> None:
        self._depth = anatomy.depth
        if self._budget is None:
            layer = self.layer if self.layer is not None else _OFFICIAL_LAYER if self.faithful else 0.5
            self.stages = (resolve_layer(layer, anatomy.depth, first=0) - 1,)
        elif isinstance(self._budget.keep, float):
            layer = max(1, round(self._budget.keep * anatomy.depth))
            self.stages = (layer - 1,) if layer < anatomy.depth else ()
        else:  # K depends on how many visual tokens a sample has
            self.stages = tuple(range(anatomy.depth - 1))

    def decide(self, view: View) -> Decision | None:
        if self._budget is None or isinstance(self._budget.keep, float):
            return Decision(keep=view.active & ~view.visual)
        if "layers" not in view.state:
            layers = self._layers_for_count(self._budget.keep, view)
            view.state["layers"], view.state["wanted"] = layers, set(layers.tolist())
        if view.stage + 1 not in view.state["wanted"]:
            return None
        withdrawn = view.state["layers"] == view.stage + 1
        return Decision(keep=view.active & ~(view.visual & withdrawn[:, None]))

    def _layers_for_count(self, count: int, view: View) -> Tensor:
        """(B,) K of each sample, `depth` where nothing is withdrawn."""
        visual = view.active_visual.sum(1)
        stay = counts_per_row(Budget(count), view)
        return rounded_ratio(stay * self._depth, visual.clamp_min(1)).clamp_min(1)
