"""Verdicts and the importance ranking: Gram matrices, elimination, the sensitivity of the output."""

from prune_viz.redundancy.channel_verdicts import ChannelVerdict, GroupVerdicts
from prune_viz.redundancy.importance import measure_groups, rank_groups

__all__ = ["ChannelVerdict", "GroupVerdicts", "measure_groups", "rank_groups"]
