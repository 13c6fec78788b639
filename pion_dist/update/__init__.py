"""The Pion step as pure functions on batches of matrices [B, m, n], without process groups.

Notation, after arXiv 2605.12492: a weight W (m x n), its gradient G, a skew generator A_in (n x n)
acting from the right and A_out (m x m) from the left, an orthogonal factor E(A), and the step
W <- E(a A_out) W E(a A_in). ``step`` takes its options as a ``PionConfig``. Read in this order:
precision, generators, direction, retraction, layout, readings, step; then squares, muon, frames,
polar.
"""
