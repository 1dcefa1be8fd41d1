"""Token importance: gradients of the answer's loss, token weights w_t, and the token-level calibration set."""
