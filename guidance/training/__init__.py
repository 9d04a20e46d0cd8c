"""Training of heads, adapters and the testbed's networks."""
