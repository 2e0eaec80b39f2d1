"""FLOPs of what is no matrix product, by our convention. Plain numbers: plans are made without torch."""

# Of one state for one token: Δ A, its exponential, times h, Δ x times B, their sum, and two for C h.
SCAN = 7
BACKWARD = 2  # times as many as forward, as of products; what is made again is not counted
