"""The functions of ``import qmerge``: what the commands do, with typed settings, returning data.

The settings are the fields of ``qmerge.recipe.Recipe``, written out so that editors complete them; a test compares the two.
Torch and the other libraries are imported by the first call.
"""

from qmerge.api.folders import fidelity, inspect, push, verify
from qmerge.api.merging import measure, merge, plan

__all__ = ["fidelity", "inspect", "measure", "merge", "plan", "push", "verify"]
