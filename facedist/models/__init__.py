"""The network: backbones, the embedding layer and the margin heads."""
