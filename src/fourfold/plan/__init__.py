"""`fourfold plan`: what a model will take and give on a machine, before anyone buys either.

`work` counts what a step must do, on the engine's own program and footprint; `machines` says what a machine can do,
measured by `calibrate` or described in a file; `times` divides the one by the other; `answer` puts it together.
docs/planning.md states the model of the machine.
"""

from fourfold.plan.answer import plan
from fourfold.plan.tables import render

__all__ = ["plan", "render"]
