"""Layer-wise calibration: the loop over decoder layers, and the two activation streams through them."""
