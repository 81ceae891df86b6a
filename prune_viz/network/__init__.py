"""A network as the rest sees it: its copies, the feature maps of its filters, its inputs and outputs."""

from prune_viz.network.filter_network import FilterNetwork
from prune_viz.network.inputs import InputStatistics

__all__ = ["FilterNetwork", "InputStatistics"]
