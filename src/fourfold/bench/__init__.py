"""`fourfold bench`: figures of this machine, each beside the limit that was measured in the same run.

`matrix` times one matrix, `model` a whole model, `prediction` a plan beside a model, `limits` what the memory and the
cores can do at best. A result is a dictionary, ready for JSON, that `render` shows to people. No figure is given for a
result that is wrong.
"""

from fourfold.bench.matrix import linear
from fourfold.bench.model import decode, prefill
from fourfold.bench.prediction import plan
from fourfold.bench.tables import render

__all__ = ["decode", "linear", "plan", "prefill", "render"]
