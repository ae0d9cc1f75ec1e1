"""DyCoke's temporal merging against its code: every row that it returns, in its order."""

from __future__ import annotations

from pathlib import Path

from foveate.ops.select import put_tokens
from foveate.reducers.dycoke import DyCoke

from . import Golden
from ._video import BEFORE, kept_of_video, video_view


def check(path: Path) -> None:
    """Compare everything in one file of `goldens/dycoke`."""
    golden = Golden(path)
    patches = golden.scalar("tokens_per_frame")
    view = video_view(golden["features"].view(-1, patches, golden["features"].shape[1]))
    decision = DyCoke(merging_ratio=golden.scalar("merging_ratio"), faithful=True).decide(view)
    rows = put_tokens(view.hidden, decision.slots, decision.values, spare=0)[0]
    kept = BEFORE + kept_of_video(view, decision.keep)
    golden.compare("out", rows[kept])
    carried = (decision.origin[0] >= 0) & view.visual[0]
    order = decision.origin[0, carried].argsort()
    golden.compare("source_idx", carried.nonzero()[order, 0] - BEFORE)
    golden.finish()
