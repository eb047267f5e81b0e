"""Looking inside a network: what its forward and backward pass compute, layer by layer."""
