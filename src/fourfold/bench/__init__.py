"""`fourfold bench`: figures of this machine, each beside the limit that was measured in the same run.

`matrix` times one matrix, `model` a whole model, `speculation` what drafts save it, `prediction` a plan beside a model,
`reduction` the sums of all ranks,
`loading` and `conversion` a model's way into memory and into the format, `limits` what the memory and the cores can do
at best. A result is a dictionary, ready for JSON, that `render` shows to people. No figure is given for a result that
is wrong.
"""

from fourfold.bench.conversion import quantize
from fourfold.bench.loading import load
from fourfold.bench.matrix import linear
from fourfold.bench.model import decode, prefill
from fourfold.bench.prediction import plan
from fourfold.bench.reduction import reduce
from fourfold.bench.speculation import speculate
from fourfold.bench.tables import render

__all__ = ["decode", "linear", "load", "plan", "prefill", "quantize", "reduce", "render", "speculate"]
