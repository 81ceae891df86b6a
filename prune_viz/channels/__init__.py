"""The channel graph: which filters can only be removed together, and who reads them."""

from prune_viz.channels.coupling import ChannelGraph, build_graph, find_groups
from prune_viz.channels.groups import CouplingGroup

__all__ = ["ChannelGraph", "CouplingGroup", "build_graph", "find_groups"]
