"""Clusters and maps of the filters of a layer, and of the whole network."""

from prune_viz.embedding.layer_map import Embedding
from prune_viz.embedding.network_map import NetworkMaps, embed_network

__all__ = ["Embedding", "NetworkMaps", "embed_network"]
