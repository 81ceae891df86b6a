"""The channel graph: which filters can only be removed together, and who reads them."""

from prune_viz.channels.coupling import find_groups
from prune_viz.channels.groups import CouplingGroup

__all__ = ["CouplingGroup", "find_groups"]
